"""A checkpoint as a Hugging Face directory, and back.

config.json  generation_config.json  model.safetensors    what T5ForConditionalGeneration.from_pretrained reads
tokenizer.json  tokenizer_config.json                     what AutoTokenizer.from_pretrained reads
atomas/config.yaml  heads.safetensors                     what transformers has no place for: poolers, hierarchy
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, T5Config

from atomas.config import Config
from atomas.config_file import dump_config, load_config
from atomas.data.tokenizer import EOS_ID, PAD_ID, UNK_ID, AtomasTokenizer
from atomas.errors import AtomasError
from atomas.training.checkpoint import publish, resolve_checkpoint, verify_checkpoint
from atomas.training.model_files import read_model, write_model

BACKBONE = "encoder.backbone.t5."
HEADS = "atomas"
EMBEDDING, OUTPUT = "shared.weight", "lm_head.weight"
CAPTION_RULES = "generation_config_captions.json"
"""Beside `generation_config.json`, which then writes SMILES, where the model was trained for both."""
NUM_BEAMS = 5
"""Of the published evaluation."""


def export_checkpoint(checkpoint: Path, out: Path, *, best: bool = False, momentum: bool = False) -> None:
    """Write the Hugging Face directory `out`, of the momentum copy if asked for.

    Raises:
        AtomasError: the checkpoint is missing, damaged or has no such weights; `out` is not empty.
    """
    folder = resolve_checkpoint(checkpoint, best=best)
    verify_checkpoint(folder)
    model, tokenizer, config = read_model(folder, momentum=momentum)
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    backbone = {n.removeprefix(BACKBONE): w for n, w in weights.items() if n.startswith(BACKBONE)}
    t5_config = model.encoder.backbone.t5.config
    generates = hasattr(model.encoder.backbone.t5, "lm_head")
    with new_folder(out) as partial:
        kind = "T5ForConditionalGeneration" if generates else "T5EncoderModel"
        _write_json(partial / "config.json", _public_config(t5_config, kind))
        if generates:
            rules = _generation_config(config, tokenizer.vocab_size, t5_config.vocab_size)
            rules.save_pretrained(partial)
            if config.loss.task == "both":
                rules.decoder_start_token_id = model.start_id("text")
                rules.save_pretrained(partial, CAPTION_RULES)
            if not t5_config.scale_decoder_outputs:
                # Such a T5 counts as untied, whatever the weights are: transformers 4 looks for both.
                backbone.setdefault(OUTPUT, backbone[EMBEDDING].clone())
        save_file(backbone, partial / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(partial)
        (partial / HEADS).mkdir()
        (partial / HEADS / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        heads = {name: weight for name, weight in weights.items() if not name.startswith(BACKBONE)}
        save_file(heads, partial / HEADS / "heads.safetensors")
        partial.rename(out)


def import_export(folder: Path, out: Path) -> None:
    """Make a checkpoint of a directory that `export_checkpoint` wrote: the same weights, without a momentum copy.

    Raises:
        AtomasError: the directory was not written by an export, or is damaged; `out` is not empty.
    """
    if not (folder / HEADS / "config.yaml").is_file():
        raise AtomasError(
            f"{folder} is no export of `atomas export` (it has no {HEADS}/config.yaml); to start from a plain T5 "
            f"checkpoint, train with --model.pretrained {folder}"
        )
    try:
        config = load_config(folder / HEADS / "config.yaml")
        t5_config = T5Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        weights = load_file(folder / HEADS / "heads.safetensors")
        backbone = load_file(folder / "model.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise AtomasError(f"{folder} cannot be read: {' '.join(str(error).split())}") from None
    if OUTPUT in backbone and torch.equal(backbone[OUTPUT], backbone[EMBEDDING]):
        del backbone[OUTPUT]
    weights |= {f"{BACKBONE}{name}": weight for name, weight in backbone.items()}
    write_checkpoint(out, config, t5_config, weights, AtomasTokenizer.load(folder))


def write_checkpoint(
    out: Path,
    config: Config,
    t5_config: Any,
    weights: Mapping[str, Tensor],
    tokenizer: AtomasTokenizer,
    *,
    momentum: Mapping[str, Tensor] | None = None,
    queue: Mapping[str, Tensor] | None = None,
    step: int = 0,
) -> None:
    """Make `out` a checkpoint that can be used but not continued; it is read once before it gets its name.

    Raises:
        AtomasError: the weights do not fit the configuration, or `out` is not empty.
    """
    with new_folder(out) as partial:
        write_model(partial / "model", config, t5_config, weights, momentum, tokenizer)
        if queue is not None:
            save_file(
                {name: tensor.contiguous() for name, tensor in queue.items()}, partial / "queue.safetensors"
            )
        read_model(partial, momentum=momentum is not None)
        publish(partial, out, step)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill and to rename to `out`; it is removed if that does not happen."""
    out = Path(out).absolute()
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise AtomasError(f"{out} exists and is not an empty folder: choose another --out")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if out.exists():
            out.rmdir()
        yield partial
    except OSError as error:
        raise AtomasError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _public_config(t5_config: Any, kind: str) -> dict[str, Any]:
    """T5's `config.json` with one meaning for every version of transformers.

    Before version 5, `tie_word_embeddings` said both whether the output layer is the embedding and whether the
    decoder's outputs are scaled; version 5 takes the scaling from it and sees the rest from the weights.
    """
    values: dict[str, Any] = t5_config.to_dict()
    start = values.get("decoder_start_token_id")
    return values | {
        "architectures": [kind],
        "tie_word_embeddings": t5_config.scale_decoder_outputs,
        "decoder_start_token_id": PAD_ID if start is None else start,
        "dtype": "float32",
        "_name_or_path": "",
    }


def _generation_config(config: Config, num_tokens: int, num_rows: int) -> GenerationConfig:
    """Beam search as in the published evaluation, up to what the model was trained to write.

    As in `atomas generate`, <unk> and the rows of the embedding that are no token of the tokenizer are never written.
    """
    limits = {"genmol": config.data.max_smiles_tokens, "gentext": config.data.max_text_tokens}
    return GenerationConfig(
        num_beams=NUM_BEAMS,
        max_new_tokens=limits.get(config.loss.task, max(limits.values())),
        decoder_start_token_id=PAD_ID,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        suppress_tokens=[UNK_ID, *range(num_tokens, num_rows)],
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

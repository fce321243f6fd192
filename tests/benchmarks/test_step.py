"""The step benchmark: the published form is the published form, ours and its ablations compute the same."""

import json
import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config

from atomas.benchmarks.step.measurement import Job, build_step, measure
from atomas.benchmarks.step.pairs import TokenPair, collate, draw_batches
from atomas.benchmarks.step.presets import PRESETS, Preset
from atomas.benchmarks.step.published import PaddedBatch, PublishedModel
from atomas.benchmarks.step.same_loss import TOLERANCE, check_same_loss
from atomas.benchmarks.step.switches import (
    OPTIONS,
    OURS,
    PUBLISHED,
    SWITCHES,
    ablation_providers,
    change_process,
    configured,
    description,
    option_providers,
    path_providers,
)
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.distributed.process_group import process_group
from atomas.errors import AtomasError
from atomas_kernels import registry

SMALL = Preset(d_model=32, d_kv=8, d_ff=64, layers=2, heads=4, vocabulary=160, queue=16, length=64)


def batches(count: int, size: int = 4) -> list[list[TokenPair]]:
    generator = torch.Generator().manual_seed(0)

    def side(length: int) -> list[int]:
        return [*torch.randint(3, SMALL.vocabulary, (length - 1,), generator=generator).tolist(), 1]

    lengths = torch.randint(5, SMALL.length, (count, size, 2), generator=generator).tolist()
    return [[TokenPair(side(text), side(smiles)) for text, smiles in batch] for batch in lengths]


def job(provider: str, *, steps: int = 3, world_size: int = 1, limit: int = 1 << 40) -> Job:
    config = SMALL.config(batch_size=4, device="cpu", dropout=0.0, threads=1, world_size=world_size)
    return Job(
        provider=provider,
        preset=SMALL,
        config=configured(provider, config),
        batches=batches(3)[:steps],
        warm_up=1,
        seconds=60,
        memory_limit=limit,
        world_size=world_size,
    )


def test_the_published_form_has_the_golden_losses(golden: Path) -> None:
    values = load_file(golden / "training.safetensors")
    prefix = "genmol.init."
    init = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    config = T5Config(**json.loads((golden / "t5_config.json").read_text()))
    model = PublishedModel(config, length=48, queue_size=16, tie_noise=0.0).eval()
    model.load_state_dict(init, strict=False)
    assert set(init) <= set(model.state_dict())
    numbers = torch.arange(4)
    sides = {
        name: RaggedTokens(ids=values[f"{name}_ids"].flatten(), lengths=torch.full((4,), 48))
        for name in ("text", "smiles")
    }
    batch = PairBatch(**sides, molecule_id=numbers, text_id=numbers, sample_id=numbers)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for expected in values["genmol.losses"]:
        losses = model(PaddedBatch.of(batch, 48))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        found = [losses[name] for name in ("loss/global", "loss/lm", "loss/hierarchical", "loss")]
        torch.testing.assert_close(torch.stack(found).detach(), expected.float(), rtol=1e-4, atol=1e-4)


def test_at_full_length_ours_has_the_published_losses_and_gradients() -> None:
    config = SMALL.config(batch_size=4, device="cpu", dropout=0.1, threads=1)
    found = check_same_loss(config, SMALL, torch.device("cpu"), pairs=4)
    assert found.deviation <= TOLERANCE


def test_another_loss_is_noticed() -> None:
    config = SMALL.config(batch_size=4, device="cpu", dropout=0.0, threads=1)
    other = replace(config, loss=replace(config.loss, alpha=0.1))
    with pytest.raises(AtomasError, match="losses by"):
        check_same_loss(other, SMALL, torch.device("cpu"))


def losses_of_all(providers: list[str], sender: Connection) -> None:
    """Send the losses of every step of each provider; in a process of its own, for it changes what operators run."""
    known = dict(registry._IMPLEMENTATIONS)
    with process_group(job(OURS).config.run) as (_, device):
        for provider in providers:
            registry._IMPLEMENTATIONS.update(known)
            step = build_step(job(provider), device)
            for number, pairs in enumerate(job(provider).batches):
                sender.send({name: float(value) for name, value in step(collate(pairs, 4 * number)).items()})
    sender.close()


def test_what_is_switched_off_changes_no_loss() -> None:
    names = dict.fromkeys([OURS, *ablation_providers(), *path_providers(), "with:checkpointing"])
    providers = [name for name in names if name != PUBLISHED]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=losses_of_all, args=(providers, sender), daemon=True)
    process.start()
    sender.close()
    found = {name: [receiver.recv() for _ in job(name).batches] for name in providers}
    process.join()
    for provider in providers[1:]:
        for step, (ours, other) in enumerate(zip(found[OURS], found[provider], strict=True)):
            for name in ("loss", "loss/global", "loss/hierarchical", "loss/lm"):
                assert other[name] == pytest.approx(ours[name], rel=1e-4), f"{provider}, step {step}: {name}"


def test_every_switch_changes_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, switch in SWITCHES.items():
        assert switch.operators or switch.model or switch.optimizer or switch.process, name
        for operator, _ in switch.operators:
            table = dict(registry._IMPLEMENTATIONS)
            monkeypatch.setattr(registry, "_IMPLEMENTATIONS", table)
            before = registry._select(operator, torch.device("cpu"), torch.float32).target
            change_process((name,))
            assert registry._select(operator, torch.device("cpu"), torch.float32).target != before
            monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize(("option", "tolerance"), [("compile", 1e-4), ("bf16", 3e-2)])
def test_options_change_losses_by_rounding_alone(option: str, tolerance: float) -> None:
    ours, other = (measure(job(name))[0] for name in (OURS, f"with:{option}"))
    assert other.status == "ok", other.reason
    for name in ("loss", "loss/global", "loss/hierarchical", "loss/lm"):
        assert other.losses[name] == pytest.approx(ours.losses[name], rel=tolerance), name


def test_options_are_those_that_a_run_has_not() -> None:
    config = SMALL.config(batch_size=4, device="cpu", dropout=0.0, threads=1)
    assert option_providers(config) == [f"with:{name}" for name in OPTIONS]
    assert "with:bf16" not in option_providers(configured("with:bf16", config))


def test_every_provider_says_what_it_is() -> None:
    config = SMALL.config(batch_size=4, device="cpu", dropout=0.0, threads=1)
    names = [*path_providers(), *ablation_providers(), *option_providers(config)]
    assert [name for name in names if not description(name)] == [PUBLISHED]


def test_a_provider_in_a_process_of_its_own() -> None:
    held = torch.ones(1 << 28)  # a GiB, which is no memory of the provider
    ours = measure(job(OURS))[0]
    del held
    assert ours.status == "ok", ours.reason
    assert len(ours.seconds) == len(ours.cpu_seconds) == len(ours.phases) == 2
    assert ours.base_mb is not None
    assert ours.peak_mb is not None
    assert ours.base_mb <= ours.peak_mb < 1024


def test_too_little_memory_is_a_result() -> None:
    found = measure(job(OURS, limit=16 << 20))[0]
    assert found.status == "oom", found.reason


@pytest.mark.slow
def test_two_ranks() -> None:
    found = measure(job(OURS, world_size=2))
    assert [each.status for each in found] == ["ok", "ok"], found[0].reason
    assert all(len(each.seconds) == 2 for each in found)


def test_batches_have_the_lengths_of_the_corpus() -> None:
    pairs = [TokenPair([1] * n, [1] * n) for n in range(1, 101)]
    drawn = draw_batches(pairs, size=10, count=20, seed=0)
    means = [sum(len(pair.text) for pair in batch) / 10 for batch in drawn]
    assert max(abs(mean - 50.5) for mean in means) < 5
    assert drawn != draw_batches(pairs, size=10, count=20, seed=1)
    assert all(preset.d_model % 8 == 0 for preset in PRESETS.values())

"""`atomas config`: look at what a run would be."""

import argparse
import ast
import inspect
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas config` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "config",
        help="show, check and explain configurations",
        description="Show, check and explain configurations.",
        epilog="Examples: atomas config show --config configs/train/demo.yaml --training.max_steps 20\n"
        "          atomas config keys\n          atomas config explain data.batch_size",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        help="print a configuration with every default and override in place",
        epilog="Example: atomas config show --config configs/train/demo.yaml --training.max_steps 20",
    )
    show.add_argument("--config", help="YAML file; without it, the defaults")
    show.set_defaults(run=_show, overrides=True)
    keys = actions.add_parser(
        "keys",
        help="list every key, its type and its default",
        epilog="Example: atomas config keys | grep momentum",
    )
    keys.set_defaults(run=_keys)
    explain = actions.add_parser(
        "explain", help="say what a key means", epilog="Example: atomas config explain data.batch_size"
    )
    explain.add_argument("key", help="such as data.batch_size")
    explain.set_defaults(run=_explain)


def _show(args: argparse.Namespace) -> None:
    from atomas.config_file import dump_config, load_config

    print(dump_config(load_config(args.config, args.overrides)), end="")


def _keys(args: argparse.Namespace) -> None:
    from atomas.config import Config
    from atomas.config_file import config_keys

    defaults = Config()
    for key, annotation in config_keys().items():
        section, name = key.split(".")
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        print(f"{key:40} {kind:36} {getattr(getattr(defaults, section), name)!r}")


def _explain(args: argparse.Namespace) -> None:
    from atomas import config as config_module
    from atomas.config_file import check_key

    check_key(args.key)
    section, name = args.key.split(".")
    section_type = type(getattr(config_module.Config(), section))
    print(f"{args.key}\n  {_field_doc(section_type, name)}")
    print(f"  default: {getattr(section_type(), name)!r}")


def _field_doc(section_type: type, name: str) -> str:
    """The string that stands under a field in the source of its class."""
    body = ast.parse(inspect.getsource(section_type)).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == name
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            return str(following.value.value)
    raise AssertionError(f"{name} has no docstring")

"""The command line: ``padst plan | demo | bench | explain | export``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from padst_compiler import bench_cli

__all__ = ["main"]

_MODEL = """\
MODEL is a Python reference, module:factory or file.py:factory. The factory takes no arguments and
returns a model, or a model and example inputs (a tensor, a tuple of tensors or a dict):

    def make():
        return MyModel(), torch.randn(8, 197, 768)

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    0 is done; 1 done, and something computes wrong numbers; 2 refused with a reason on stderr.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], object] = options.command
    try:
        result = command(options)
        print(result)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"padst: {error}", file=sys.stderr)
        return 2
    return 0 if getattr(result, "right", True) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="padst",
        description="Train sparse layers with learned shuffles; compile the shuffles away.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_demo(commands)
    _add_bench(commands)
    _add_explain(commands)
    _add_export(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], object], text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"{_MODEL if 'MODEL' in example else ''}example:\n    {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def _add_sparsity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="module:factory")
    parser.add_argument(
        "--structure",
        default="block",
        help="block[:size], nm[:m] or nm:n:m, diagonal, fan_in[:k], unstructured (default block)",
    )
    parser.add_argument(
        "--sparsity", type=float, default=0.9, help="share of zeros, in [0, 1) (default 0.9)"
    )
    parser.add_argument(
        "--permutation", default="learned", help="learned, random or none (default learned)"
    )


def _add_plan(commands: Any) -> None:
    text = "show every linear layer of a model, what would be done with it, and why"
    example = "padst plan my_models.py:MODEL --structure block:32"
    _add_sparsity(_command(commands, "plan", _plan, text, example))


def _add_demo(commands: Any) -> None:
    text = "train, harden, compile, export and compare a small model, in minutes"
    parser = _command(commands, "demo", _demo, text, "padst demo --data fashion_mnist.npz")
    parser.add_argument("--data", type=Path, help=".npz of images; default: bundled digits")
    parser.add_argument("--out", type=Path, default=Path("padst-demo"), help="folder for results")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per variant (default 3)")
    parser.add_argument(
        "--epochs", type=int, help="passes over the data (default 25; 6 with --data)"
    )


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", _bench, bench_cli.TEXT, bench_cli.EXAMPLE)
    _add_sparsity(parser)
    bench_cli.add_arguments(parser)


def _add_explain(commands: Any) -> None:
    text = "show what the compiler folds, what it leaves and why, and each layer's kernel"
    _add_sparsity(_command(commands, "explain", _explain, text, "padst explain my_models.py:MODEL"))


def _add_export(commands: Any) -> None:
    text = "write the folded inference graph as ONNX, checked in onnxruntime"
    example = "padst export my_models.py:MODEL model.onnx --checkpoint trained.safetensors"
    parser = _command(commands, "export", _export, text, example)
    parser.add_argument("model", metavar="MODEL", help="module:factory")
    parser.add_argument("path", type=Path, help="the file to write")
    parser.add_argument("--checkpoint", type=Path, help="load this file of padst.save first")
    parser.add_argument("--fixed-batch", action="store_true", help="keep the example's batch size")


def _plan(options: argparse.Namespace) -> str:
    from padst_compiler.plan import plan
    from padst_compiler.reference import model_and_inputs

    model, inputs = model_and_inputs(options.model)
    return str(
        plan(
            model,
            inputs,
            structure=options.structure,
            sparsity=options.sparsity,
            permutation=options.permutation,
        )
    )


def _demo(options: argparse.Namespace) -> str:
    from padst_compiler.demo import run

    return run(options.data, options.out, seeds=options.seeds, epochs=options.epochs)


def _sparse(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model, sparsified (unless it is already) and hardened, with its inputs."""
    from padst_compiler.layers import sparse_layers
    from padst_compiler.reference import model_and_inputs
    from padst_compiler.sparsify import sparsify
    from padst_compiler.training import harden

    model, inputs = model_and_inputs(options.model)
    if inputs is None:
        raise ValueError(
            f"Expected {options.model} to return (model, example_inputs). Got a model only. "
            "Return example inputs too."
        )
    if not sparse_layers(model):
        sparsify(
            model,
            structure=options.structure,
            sparsity=options.sparsity,
            permutation=options.permutation,
            example_inputs=inputs,
        )
    return harden(model).eval(), inputs


def _bench(options: argparse.Namespace) -> object:
    if options.model in bench_cli.DEVICES:
        return bench_cli.DEVICES[options.model](options)
    from padst_compiler.benchmark import compare_with_dense

    model, inputs = _sparse(options)
    return compare_with_dense(model, inputs, rounds=options.rounds or 11)


def _explain(options: argparse.Namespace) -> str:
    from padst_compiler.explanation import explain

    return str(explain(*_sparse(options)))


def _export(options: argparse.Namespace) -> str:
    from padst_compiler.backend import export_onnx
    from padst_compiler.checkpoint import load
    from padst_compiler.reference import model_and_inputs

    model, inputs = model_and_inputs(options.model)
    if inputs is None:
        raise ValueError(
            f"Expected {options.model} to return (model, example_inputs). Got a model only. "
            "Return example inputs too."
        )
    if options.checkpoint is not None:
        load(model, options.checkpoint)
    return str(export_onnx(model, inputs, options.path, dynamic_batch=not options.fixed_batch))

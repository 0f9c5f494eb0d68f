"""`perennial make-checkpoint`: a seeded random model in the Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("make-checkpoint")(make_checkpoint)


def make_checkpoint(
    path: Annotated[Path, typer.Argument(help="Folder to create.")],
    family: Annotated[str, typer.Option(help="llama, mistral, qwen2, qwen3 or opt.")] = "llama",
    layers: Annotated[int, typer.Option(min=1)] = 6,
    hidden: Annotated[int, typer.Option(min=1)] = 128,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int, typer.Option(min=1)] = 4,
    ffn: Annotated[int, typer.Option(min=1)] = 256,
    vocab: Annotated[int, typer.Option(min=1)] = 512,
    max_positions: Annotated[int, typer.Option(min=1)] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a random model: config.json, safetensors, tokenizer. Equal arguments give equal bytes."""
    with Console(stderr=True).status("writing the checkpoint"):
        from serving.engine.checkpoint import create_checkpoint

        spec = create_checkpoint(
            str(path),
            family=family,
            seed=seed,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            ffn=ffn,
            vocab=vocab,
            max_positions=max_positions,
            dtype=dtype,
        )
    Console().print(f"{path}: {spec.family}, {spec.layers} layers, {spec.weight_bytes / 1e6:.1f} MB of {spec.dtype}")

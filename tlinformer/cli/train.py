"""`tlinformer train`: its options are the fields of TrainConfig and TLinFormerConfig."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from ..config import TLinFormerConfig
from ..settings import TrainConfig

MODEL_HELP = {
    "vocab_size": "Vocabulary V (default: the tokenizer's).",
    "hidden_size": "Width D; required.",
    "num_attention_heads": "Query heads Hq; required.",
    "num_key_value_heads": "Key/value heads Hkv (default: as many as query heads).",
    "num_blocks": "Stacked blocks nb.",
    "block_depth": "Layers inside a block, P >= 2.",
    "history_window": 'Rows of compressed history Woh, or "auto" (logarithmic).',
    "generation_window": "Tokens between two slides, Wog.",
    "intermediate_size": "SwiGLU width F (default: 8 D / 3, a multiple of 256).",
    "rope_theta": "Base of the rotary frequencies.",
    "layer_norm_eps": "Epsilon of the layer norms.",
    "history_window_coefficient": 'The c of history_window "auto", c ln C.',
    "dropout": "Dropout on attention probabilities and MLP outputs.",
}


def _options() -> Iterator[inspect.Parameter]:
    """One option for each field; None means that the command line does not give it."""

    def option(name: str, kind: Any, default: Any, text: str, panel: str) -> inspect.Parameter:
        kinds = [k for k in get_args(kind) or (kind,) if k is not type(None)]
        plain = list[str] if kind == tuple[str, ...] else str if str in kinds else kinds[0]
        flag = "--" + name.replace("_", "-")
        if plain is bool:
            flag += "/--no-" + name.replace("_", "-")
        if default is not None and default is not MISSING and default != ():
            text += f" (default: {default})"
        info = typer.Option(flag, help=text, show_default=False, rich_help_panel=panel)
        annotation: Any = Annotated[plain | None, info]
        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, keyword, default=None, annotation=annotation)

    hints = get_type_hints(TrainConfig)
    for item in fields(TrainConfig):
        if item.name != "model":
            yield option(item.name, hints[item.name], item.default, item.metadata["help"], "Run")
    hints, defaults = (
        get_type_hints(TLinFormerConfig),
        {f.name: f for f in fields(TLinFormerConfig)},
    )
    for name, text in MODEL_HELP.items():
        yield option(name, hints[name], defaults[name].default, text, "Model")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, over those of the file beside it that ``base`` names.

    Raises FileNotFoundError or ValueError naming the file.
    """
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model", {}), dict):
        raise ValueError(f"{path} must be a mapping of settings, and model in it likewise")
    if base := recipe.pop("base", None):
        below = read_recipe(path.parent / str(base))
        recipe["model"] = below.get("model", {}) | recipe.get("model", {})
        recipe = below | recipe
    return recipe


def train_command(
    config: Annotated[
        Path | None, typer.Option(help="YAML recipe of these settings; options given here win.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output where it stopped.")
    ] = False,
    **given: Any,
) -> None:
    """Train a model on text files or a data set.

    The directory --output receives best/, the weights of the lowest validation loss. On several
    GPUs: torchrun --nproc-per-node 8 -m tlinformer train ...
    """
    from ..train import train

    given = {name: value for name, value in given.items() if value not in (None, [])}
    output = Path(given.get("output", TrainConfig.output))
    if resume and config is None and (output / "config.yaml").is_file():
        config = output / "config.yaml"
    settings = read_recipe(config) if config else {}
    model = {name: given.pop(name) for name in MODEL_HELP if name in given}
    if (window := model.get("history_window", "auto")) != "auto":
        model["history_window"] = int(window) if window.isdecimal() else window
    for name, instead in (
        ("epochs", "steps"),
        ("dataset", "train_data"),
        ("train_data", "dataset"),
    ):
        if name in given:  # wins over what a recipe has in its place
            settings.pop(instead, None)
    settings |= given | {"model": settings.get("model", {}) | model}
    console = Console()
    summary = train(TrainConfig.from_dict(settings), resume=resume, console=console)
    table = Table("best step", "validation perplexity", "bits per byte", "tokens/s", "weights")
    perplexity, bits = summary["valid_perplexity"], summary["valid_bits_per_byte"]
    speed = summary["tokens_per_second"]
    table.add_row(
        f"{summary['best_step']:,} of {summary['steps']:,}",
        f"{perplexity:.2f}" if perplexity else "-",
        f"{bits:.4f}" if bits else "-",
        f"{speed:,.0f}" if speed else "-",
        f"{summary['output']}/best",
    )
    console.print(table)


_signature = inspect.signature(train_command, eval_str=True)
_fixed = [p for p in _signature.parameters.values() if p.name != "given"]
_fixed = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _fixed]
train_command.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[*_fixed, *_options()]
)
train_command.__annotations__ = {}

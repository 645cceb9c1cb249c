"""The recipes in benchmarks/recipes are complete, and the paper's have its sizes."""

from pathlib import Path

import pytest
import torch

from tlinformer.cli.train import read_recipe
from tlinformer.config import TLinFormerConfig
from tlinformer.recipe import build_model
from tlinformer.settings import TrainConfig

RECIPES = Path(__file__).parent.parent / "benchmarks" / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_one(path):
    config = TrainConfig.from_dict(read_recipe(path))
    model = TLinFormerConfig.from_dict({"vocab_size": 50257} | config.model)
    assert config.train_data or config.dataset
    if path.parent.name != "paper":
        return
    with torch.device("meta"):
        built = build_model(config.architecture, model)
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(40.98e6, abs=5e3)
    assert config.batch_size == 256 and config.dataset == "Salesforce/wikitext"
    if config.architecture == "tlinformer" and path.stem != "wikitext-103":
        length, window, ratio = path.stem.replace("k", "").split("-")
        sizes = {"512": 512, "1": 1024, "2": 2048}
        assert config.sequence_length == sizes[length]
        assert model.history_window + model.generation_window == sizes[window]
        assert model.history_window / sizes[window] == pytest.approx(float(ratio), abs=2e-3)


def test_a_recipe_wins_over_its_base(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\nepochs: 3\nmodel: {dropout: 0.1}\n")
    (tmp_path / "b.yaml").write_text("epochs: 2\nseed: 7\nmodel: {dropout: 0.0, num_blocks: 1}\n")
    settings = read_recipe(tmp_path / "a.yaml")
    assert settings == {"epochs": 3, "seed": 7, "model": {"dropout": 0.1, "num_blocks": 1}}
    (tmp_path / "b.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.yaml: no such recipe"):
        read_recipe(tmp_path / "a.yaml")

"""A quantization is one new file and one entry in the union."""

import json

import pytest

from tests.extension.house import House
from tests.project import make_project

PER_ROW = '''"""Weights as 8-bit whole numbers, with one scale for each row."""

import math
from typing import Any, ClassVar, Literal

from llmtune.models.quantization.base import Quantization


class PerRowQuantization(Quantization):
    """8-bit weights in plain torch."""

    bits: ClassVar[int] = 8
    is_cached: ClassVar[bool] = False

    method: Literal["per-row"] = "per-row"

    def loading_config(self, dtype):
        return None

    def finish_loading(self, model):
        import torch
        from torch import nn

        class PerRowLinear(nn.Linear):
            def forward(self, x):
                weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
                return nn.functional.linear(x, weight, self.bias)

        for name, layer in model.named_modules():
            if type(layer) is nn.Linear and not name.endswith("lm_head"):
                codes, scale = codes_of(layer.weight.data)
                layer.__class__ = PerRowLinear
                layer.weight = nn.Parameter(codes, requires_grad=False)
                layer.register_buffer("scale", scale)

    @classmethod
    def kind_of(cls, layer):
        return "per-row" if type(layer).__name__ == "PerRowLinear" else None

    def settings_of(self, layer):
        return (self.kind_of(layer),)

    def wanted_settings(self, dtype):
        return (self.method,)

    def quantized_weights(self, skeleton, dtype):
        from torch import nn

        return {
            f"{name}.weight": False
            for name, layer in skeleton.named_modules()
            if type(layer) is nn.Linear and not name.endswith("lm_head")
        }

    def stored_bytes(self, shape):
        return math.prod(shape) + 4 * shape[0]

    def round_trip(self, device, dtype):
        return PerRowRoundTrip()

    def notices(self, dtype):
        yield "kept in whole numbers"


class PerRowRoundTrip:
    block_size = 1

    def measure(self, tiles):
        return None

    def apply(self, tile_RC, scales_B):
        codes, scale = codes_of(tile_RC)
        return codes.float() * scale


def codes_of(weight):
    import torch

    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
    return (weight.float() / scale).round().to(torch.int8), scale
'''


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    house = House(tmp_path_factory.mktemp("house"))
    house.add("models/quantization/per_row.py", PER_ROW)
    house.enter(
        "models/quantization/config.py",
        {
            "from llmtune.models.quantization.none import NoQuantization\n": (
                "from llmtune.models.quantization.none import NoQuantization\n"
                "from llmtune.models.quantization.per_row import PerRowQuantization\n"
            ),
            "| Int8Quantization | NoQuantization": (
                "| Int8Quantization | PerRowQuantization | NoQuantization"
            ),
        },
    )
    return house


def test_new_quantization_is_planned_trained_and_merged(house, tmp_path):
    config = make_project(
        tmp_path, merge={"base": "dequantized"}, train={"max_steps": 2, "batch_size": 4}
    )
    knob = "model.quantization={method: per-row}"
    base_bytes = [
        json.loads(house.run("plan", str(config), *knobs, "--json", cwd=tmp_path).stdout)["memory"][
            "components"
        ]["base"]
        for knobs in ([knob], [])
    ]
    trained = house.run("train", str(config), knob, cwd=tmp_path)
    house.run("merge", str(config), knob, cwd=tmp_path)

    assert base_bytes[0] < base_bytes[1]
    assert "kept in whole numbers" in trained.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    table = manifest["stages"]["train"]["result"]["quantization"]
    assert table["method"] == "per-row"
    assert "per-row" in {row["kind"] for row in table["rows"]}
    price = manifest["stages"]["train"]["result"]["quantization_price"]
    assert price["method"] == "per-row" and "per-row" in price["base_bytes"]
    merged = manifest["stages"]["merge"]["result"]
    assert merged["base"] == "dequantized"
    assert merged["check"]["kl"] < 0.01

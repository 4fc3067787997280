# To be appended to tests/test_helpers.py, without the imports that are there already.
import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model


class _TinyBlocks(nn.Module):
    """Two blocks on the CPU. `aligned` answers the data strongly, `blind` hardly, and `plain` like to noise."""

    def __init__(self, d=16, rank=2):
        super().__init__()
        torch.manual_seed(0)
        self.data = torch.randn(rank, d)
        self.head = nn.Linear(d, d)
        self.layers = nn.ModuleList([nn.ModuleDict(self._block(d)) for _ in range(2)])

    def _block(self, d):
        inside = torch.linalg.qr(self.data.T).Q
        inside = inside @ inside.T
        block = {name: nn.Linear(d, d) for name in ("aligned", "blind", "plain")}
        with torch.no_grad():
            block["aligned"].weight.copy_(inside + 0.1 * (torch.eye(d) - inside))
            block["blind"].weight.copy_(0.1 * inside + (torch.eye(d) - inside))
            block["plain"].weight.copy_(torch.randn(d, d))
        return block

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            for module in layer.values():
                module(x)
        return self.head(x)


class TestPlopSelector:
    """Tests for PlopSelector and find_plop_target_modules."""

    @pytest.fixture
    def model(self):
        return _TinyBlocks()

    @pytest.fixture
    def batches(self, model):
        return [{"x": torch.randn(2, 5, 2) @ model.data} for _ in range(3)]

    @pytest.fixture(autouse=True)
    def hooks_only(self, monkeypatch):
        monkeypatch.setattr("peft.helpers._has_plop_ext", lambda: False)

    def test_lowest_type_first(self, model, batches):
        from peft.helpers import find_plop_target_modules

        targets = find_plop_target_modules(model, batches, num_types=1, show_progress=False)
        assert targets == {"target_modules": ["layers.0.blind", "layers.1.blind"], "target_parameters": None}
        targets = find_plop_target_modules(model, batches, num_types=2, show_progress=False)
        assert {name.split(".")[-1] for name in targets["target_modules"]} == {"blind", "plain"}
        peft_model = get_peft_model(model, LoraConfig(**targets))
        adapted = {name for name, module in peft_model.base_model.model.named_modules() if hasattr(module, "lora_A")}
        assert adapted == set(targets["target_modules"])

    def test_scores_are_the_definition(self, model, batches):
        from peft.helpers import PlopSelector

        scores = PlopSelector(model, batches, show_progress=False).scores()
        assert set(scores) == {f"layers.{i}.{name}" for i in (0, 1) for name in ("aligned", "blind", "plain")}
        z = torch.cat([batch["x"].reshape(-1, 16) for batch in batches]).double()
        weight = model.layers[0]["plain"].weight.double()
        gain = ((z @ weight.T).norm(dim=1) / z.norm(dim=1)).mean()
        assert scores["layers.0.plain"] == pytest.approx((gain / (weight.norm() / 4)).item(), rel=1e-5)

    def test_single_modules(self, model, batches):
        from peft.helpers import PlopSelector

        selector = PlopSelector(model, batches, show_progress=False)
        assert selector.get_best_targets(num_modules=2) == ["layers.0.blind", "layers.1.blind"]
        assert selector.get_best_targets(threshold=0.5) == ["layers.0.blind", "layers.1.blind"]
        with pytest.raises(ValueError, match="exclude each other"):
            selector.get_best_targets(num_modules=1, threshold=0.5)

    def test_padding_is_not_counted(self, model, batches):
        from peft.helpers import PlopSelector

        plain = PlopSelector(model, batches, show_progress=False).scores()
        padded = [
            {
                "x": torch.cat([batch["x"], torch.randn(2, 3, 16)], dim=1),
                "attention_mask": torch.tensor([[1] * 5 + [0] * 3] * 2),
            }
            for batch in batches
        ]
        assert PlopSelector(model, padded, show_progress=False).scores() == pytest.approx(plain, rel=1e-5)

    def test_forward_fn_is_called(self, model, batches):
        from peft.helpers import PlopSelector

        expected = PlopSelector(model, batches, show_progress=False).scores()
        tensors = [batch["x"] for batch in batches]
        selector = PlopSelector(model, tensors, forward_fn=lambda model, x: model(x), show_progress=False)
        assert selector.scores() == pytest.approx(expected)

    def test_model_is_unchanged(self, model, batches):
        from peft.helpers import PlopSelector

        model.train()

        def fail(model, batch):
            model(**batch)
            raise RuntimeError("halfway")

        with pytest.raises(RuntimeError, match="halfway"):
            PlopSelector(model, batches, forward_fn=fail, show_progress=False).scores()
        assert model.training and not any(module._forward_hooks for module in model.modules())

    def test_no_linear_layer(self):
        from peft.helpers import PlopSelector

        with pytest.raises(ValueError, match="no `nn.Linear` in repeated blocks"):
            PlopSelector(nn.Linear(2, 2), [], show_progress=False).scores()

"""Taps where PyTorch runs a module in a way of its own: fused attention, activation checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pathways import Tapped, UserError
from pathways.probing import probe_features
from tests.pathways.reference import (
    by_hooks,
    hooks_on,
)

pytestmark = pytest.mark.usefixtures("trusted_tests")

# PyTorch's fast path of attention


class Texts(nn.Module):
    """Tokens with padding, by an encoder that goes on with nested tensors in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, tokens):
        encoded = self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0)
        return self.fc(encoded)


def read_probed(model, names, x):
    features = probe_features(model, [*names, "logits"], x)
    return features["logits"], features


def read_held(model, names, x):
    tapped = Tapped(model, names, hold=True)
    try:
        return tapped(x)
    finally:
        tapped.remove()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "read",
    [by_hooks, read_probed, read_held, lambda m, names, x: Tapped(m, names, x)(x)],
    ids=["hooks", "probe", "held", "tapped"],
)
def test_taps_in_an_encoder_with_padding(read):
    """In evaluation mode they are what they are in training mode, without dropout; the model by itself gives that too, to
    rounding, where there is no padding."""
    torch.manual_seed(0)
    model, tokens = Texts().train(), torch.randint(1, 10, (4, 5))
    tokens[0, 3:] = tokens[1, 4:] = 0
    names, seen = ["encoder.layers.0", "encoder.layers.1.linear1"], {}
    expected = model(tokens)
    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_hook(lambda m, a, y, n=n: seen.update({n: y})) for n in names]
    model(tokens)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        plain = model.eval()(tokens)
        output, features = read(model, names, tokens)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.allclose(plain[tokens == 0], expected[tokens == 0])  # the fast path gives zeros in padding
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close({n: features[n] for n in names}, seen)
    torch.testing.assert_close(output[tokens != 0], plain[tokens != 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_model_without_taps_keeps_its_fast_path():
    torch.manual_seed(0)
    model, tokens = Texts().eval(), torch.tensor([[1, 2, 0], [1, 2, 3]])
    with torch.no_grad():
        output, _ = Tapped(model, [], tokens)(tokens)
        assert torch.equal(output, model(tokens))


# Checkpointed modules


class Checkpointed(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.pre, self.body, self.fc, self.run = nn.Linear(5, 5), nn.Linear(5, 8), nn.Linear(8, 3), run

    def forward(self, x):
        return self.fc(torch.tanh(self.run(self.body, torch.tanh(self.pre(x)))))


def reentrant(module, x):
    return checkpoint(module, x, use_reentrant=True)


def without_gradients(module, x):
    with torch.no_grad():
        return module(x)


def gradients(run, name, read):
    """Of the tapped tensor's sum, by parameter."""
    torch.manual_seed(0)
    model = Checkpointed(run)
    _, features = read(model, [name], torch.randn(6, 5))
    features[name].sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [(), ("body",), ("pre",)])
def test_a_tap_without_a_graph_in_a_reentrant_checkpoint_is_refused(frozen):
    """Also where only the module itself, or only what it is given, is trained."""
    model = Checkpointed(reentrant)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    for example in (None, torch.randn(6, 5)):
        tapped = Tapped(model, ["body"], example)
        with pytest.raises(UserError, match=r"tap 'body'.*use_reentrant=True.*checkpoint with use_reentrant=False"):
            tapped(torch.randn(6, 5))
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    "name, run",
    [("body", lambda m, x: checkpoint(m, x, use_reentrant=False)), ("body:input", reentrant), ("pre", reentrant)],
)
def test_a_tap_with_a_graph_at_a_checkpoint_is_read(name, run):
    def read(model, names, x):
        return Tapped(model, names)(x)

    found, expected = gradients(run, name, read), gradients(lambda m, x: m(x), name, by_hooks)
    assert found.keys() == expected.keys() and all(torch.equal(g, found[n]) for n, g in expected.items())


def test_a_tap_that_is_not_to_be_taught_is_read():
    """In a pass without gradients, in a frozen model, where the model itself turns gradients off, and by `tap` alone."""
    x = torch.randn(6, 5)
    model = Checkpointed(reentrant)
    expected = model.body(torch.tanh(model.pre(x)))
    with torch.no_grad():
        assert torch.equal(Tapped(model, ["body"])(x)[1]["body"], expected)
    assert torch.equal(by_hooks(model, ["body"], x)[1]["body"], expected)
    model.pre.requires_grad_(False)
    model.body.requires_grad_(False)
    assert torch.equal(Tapped(model, ["body"])(x)[1]["body"], expected)
    model = Checkpointed(without_gradients)
    assert not Tapped(model, ["body"])(x)[1]["body"].requires_grad

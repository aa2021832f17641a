"""Who may be compensated; a refusal names the site and the reader at fault."""

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.errors import RefusalError
from mptqc.graph.blocks import attention_projections, norm_readers
from mptqc.graph.match import find_attentions, find_norms

C, T, HEADS, D = 4, 3, 2, 2
NORM = "n = LayerNormalization<axis=-1>(x, gamma, beta)\n"
ARRAYS = {
    "gamma": np.ones(C, np.float32),
    "beta": np.zeros(C, np.float32),
    "reversed": np.array([3, 2, 1, 0], np.int64),
    "token0": np.array(0, np.int64),
    "flat": np.array([0, T * C], np.int64),
    "heads": np.array([0, 0, HEADS, D], np.int64),
    "mixed": np.array([0, 0, D, HEADS], np.int64),
    "joined": np.array([0, 0, C], np.int64),
    "window": np.array([-1, HEADS, T, T], np.int64),
    "half": np.array(0.5, np.float32),
    "per_key": np.arange(1, T + 1, dtype=np.float32),
    "per_head": np.arange(1, HEADS + 1, dtype=np.float32).reshape(HEADS, 1, 1),
    "bias": np.ones((1, HEADS, T, T), np.float32),
    "seen": np.tri(T, dtype=bool),
    "never": np.array(-np.inf, np.float32),
    "rarely": np.array(-100, np.float32),
    "W_wide": np.ones((C, 2 * C), np.float32),
    "b_wide": np.ones(2 * C, np.float32),
    "wide_heads": np.array([0, 0, HEADS, 2 * D], np.int64),
    "wide_joined": np.array([0, 0, 2 * C], np.int64),
    "W_narrow": np.ones((2 * C, C), np.float32),
    "W_flat": np.ones((T * C, C), np.float32),
    **{f"W_{letter}": np.arange(C * C, dtype=np.float32).reshape(C, C) / 8 - 1 for letter in "qkvo"},
    **{f"b_{letter}": np.arange(C, dtype=np.float32) for letter in "qkvo"},
}


def linear(source: str, letter: str, weight: str | None = None) -> str:
    return f"m_{letter} = MatMul({source}, {weight or f'W_{letter}'})\n{letter} = Add(m_{letter}, b_{letter})\n"


@pytest.fixture
def make(smoothed):
    def from_body(body: str, outputs: str, sites: dict[str, str] | None = None) -> ir.Model:
        used = {name: array for name, array in ARRAYS.items() if name in body}
        return smoothed(f"float[b,{T},{C}] x", outputs, body, sites or {}, used)

    return from_body


def readers_of(model: ir.Model) -> list[str]:
    (norm,) = find_norms(model)
    return [str(found.output.name) for found in norm_readers(norm, model, concrete_shapes(model))]


def test_all_linears_that_read_a_norm(make):
    body = NORM + linear("n", "q") + linear("n", "k")
    assert readers_of(make(body, f"float[b,{T},{C}] q, float[b,{T},{C}] k")) == ["q", "k"]


def test_linears_behind_a_token_selection_count(make):
    body = NORM + linear("n", "k") + "first = Gather<axis=1>(n, token0)\n" + linear("first", "q")
    assert sorted(readers_of(make(body, f"float[b,{C}] q, float[b,{T},{C}] k"))) == ["k", "q"]


REFUSED_READERS = {
    "residual": (linear("n", "q") + "y = Add(n, q)", f"float[b,{T},{C}] y", "Add"),
    "graph_output": (linear("n", "q"), f"float[b,{T},{C}] q, float[b,{T},{C}] n", "the model's output"),
    "linear_without_bias": ("y = MatMul(n, W_q)", f"float[b,{T},{C}] y", "MatMul"),
    "channels_reordered": (
        "r = Gather<axis=2>(n, reversed)\n" + linear("r", "q"),
        f"float[b,{T},{C}] q",
        "another order",
    ),
    "channels_and_tokens_joined": (
        "r = Reshape(n, flat)\n" + linear("r", "q", "W_flat"),
        f"float[b,{C}] q",
        "another order",
    ),
}


@pytest.mark.parametrize("name", REFUSED_READERS)
def test_a_reader_that_cannot_be_compensated_is_named(make, name):
    body, outputs, reason = REFUSED_READERS[name]
    model = make(NORM + body, outputs, {"n": "block00.norm1"})
    with pytest.raises(RefusalError, match=reason) as caught:
        readers_of(model)
    if name != "channels_reordered" and name != "channels_and_tokens_joined":
        assert "block00.norm1" in str(caught.value)


OPERANDS = (
    linear("x", "q")
    + linear("x", "k")
    + linear("x", "v")
    + "hq = Reshape(q, heads)\ntq = Transpose<perm=[0,2,1,3]>(hq)\nhk = Reshape(k, heads)\n"
    + "tk = Transpose<perm=[0,2,3,1]>(hk)\nhv = Reshape(v, heads)\ntv = Transpose<perm=[0,2,1,3]>(hv)\n"
)
SCORES = "s = MatMul(tq, tk)\n"
SOFTMAX = "p = Softmax<axis=-1>(s)\n"
CONTEXT = "c = MatMul(p, tv)\ntc = Transpose<perm=[0,2,1,3]>(c)\nhc = Reshape(tc, joined)\n" + linear("hc", "o")
ATTENTION = OPERANDS + SCORES + SOFTMAX + CONTEXT
OUTPUT = f"float[b,{T},{C}] o"


def projections_of(model: ir.Model):
    (attention,) = find_attentions(model)
    return attention_projections(attention, model, concrete_shapes(model))


def test_the_four_linears_around_an_attention(make):
    found = projections_of(make(ATTENTION, OUTPUT))
    assert [str(one.output.name) for one in (*found.scores, found.v, found.proj)] == ["q", "k", "v", "o"]
    assert (found.heads, found.head_size) == (HEADS, D)


SCORE_PATHS = {
    "scaled": "r = Mul(s, half)\n",
    "scale_per_head": "r = Mul(per_head, s)\n",
    "divided": "r = Div(s, half)\n",
    "relative_position_bias": "r = Add(s, bias)\n",
    "subtracted_bias": "r = Sub(s, bias)\n",
    "windows_and_mask": "t = Add(s, bias)\nu = Reshape(t, window)\nr = Add(u, bias)\n",
    "filled_where_masked": "r = Where(seen, s, never)\n",
    "filled_where_seen": "r = Where(seen, never, s)\n",
}
REFUSED_SCORE_PATHS = {
    "scaled_per_key": "r = Mul(s, per_key)\n",
    "scaled_by_a_computed_value": "m = ReduceMean(x)\nr = Mul(s, m)\n",
    "subtracted_from": "r = Sub(bias, s)\n",
    "divided_by": "r = Div(half, s)\n",
    "weakly_masked": "r = Where(seen, s, rarely)\n",
}


@pytest.mark.parametrize("name", SCORE_PATHS)
def test_score_paths_that_cancel_a_shift_of_k(make, name):
    body = OPERANDS + SCORES + SCORE_PATHS[name] + SOFTMAX.replace("(s)", "(r)") + CONTEXT
    assert projections_of(make(body, OUTPUT)).heads == HEADS


@pytest.mark.parametrize("name", REFUSED_SCORE_PATHS)
def test_score_paths_that_do_not(make, name):
    body = OPERANDS + SCORES + REFUSED_SCORE_PATHS[name] + SOFTMAX.replace("(s)", "(r)") + CONTEXT
    with pytest.raises(RefusalError, match=r"block00\.attention"):
        projections_of(make(body, OUTPUT, {"p": "block00.attention"}))


REFUSED_ATTENTIONS = {
    "q_read_elsewhere": (ATTENTION + "y = Relu(q)", OUTPUT + f", float[b,{T},{C}] y", "q of"),
    "v_is_an_output": (ATTENTION, OUTPUT + f", float[b,{T},{C}] v", "v of"),
    "scores_read_elsewhere": (ATTENTION + "y = Relu(s)", OUTPUT + f", float[b,{HEADS},{T},{T}] y", "scores of"),
    "context_read_elsewhere": (ATTENTION + "y = Relu(c)", OUTPUT + f", float[b,{HEADS},{T},{D}] y", "context of"),
    "k_computed_after_its_linear": (
        ATTENTION.replace("hk = Reshape(k, heads)", "rk = Relu(k)\nhk = Reshape(rk, heads)"),
        OUTPUT,
        "k of",
    ),
    "channels_before_heads": (
        ATTENTION.replace("Reshape(q, heads)", "Reshape(q, mixed)").replace(
            "tq = Transpose<perm=[0,2,1,3]>", "tq = Transpose<perm=[0,3,1,2]>"
        ),
        OUTPUT,
        "q of",
    ),
    "v_of_another_width": (
        ATTENTION.replace("MatMul(x, W_v)", "MatMul(x, W_wide)")
        .replace("b_v)", "b_wide)")
        .replace("Reshape(v, heads)", "Reshape(v, wide_heads)")
        .replace("Reshape(tc, joined)", "Reshape(tc, wide_joined)")
        .replace("MatMul(hc, W_o)", "MatMul(hc, W_narrow)"),
        OUTPUT,
        "'v': 8",
    ),
    "context_joined_in_another_order": (
        ATTENTION.replace("tc = Transpose<perm=[0,2,1,3]>(c)", "tc = Transpose<perm=[0,2,3,1]>(c)"),
        OUTPUT,
        "another order",
    ),
}


@pytest.mark.parametrize("name", REFUSED_ATTENTIONS)
def test_an_attention_that_cannot_be_folded_is_named(make, name):
    body, outputs, reason = REFUSED_ATTENTIONS[name]
    with pytest.raises(RefusalError, match=reason) as caught:
        projections_of(make(body, outputs, {"p": "block00.attention"}))
    assert "block00.attention" in str(caught.value)

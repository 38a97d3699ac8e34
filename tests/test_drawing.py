"""`diff` and `draw`: the code of a rewrite, and its graph."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

import ligerfx
from ligerfx.errors import LigerfxError
from ligerfx.layout import layout
from models import make


@pytest.fixture(scope="module")
def llama():
    return ligerfx.optimize(make("llama", num_hidden_layers=3, device="meta"))


def test_diff_of_a_module(llama):
    text = str(ligerfx.diff(llama, "model.norm"))
    removed = [line[5:] for line in text.splitlines() if line.startswith("-    ")]
    added = [line[5:] for line in text.splitlines() if line.startswith("+    ")]
    assert added == ["rms_norm = ligerfx_kernels_rms_norm(hidden_states, weight)", "return rms_norm"]
    assert removed[0] == "pow_1 = hidden_states.pow(2)" and len(removed) == 7
    assert text.splitlines()[:2] == ["--- model.norm (captured)", "+++ model.norm (rewritten)"]


def test_diff_of_a_model_shows_equal_layers_once(llama):
    text = str(ligerfx.diff(llama))
    assert text.count("--- model.layers.") == 1 and "--- model.layers.0 and 2 alike (captured)" in text
    assert text.count("+    rms_norm_mlp = ") == 1
    assert "mlp (captured)" not in text  # it runs in the layer's code
    assert "--- model.layers.0.mlp (captured)" in str(ligerfx.diff(llama, "model.layers.0.mlp"))


def test_diff_of_code_that_did_not_change():
    gm = ligerfx.optimize(nn.Sequential(nn.Linear(4, 4)), (torch.zeros(2, 4),))
    assert str(ligerfx.diff(gm)) == ""


def test_diff_shows_what_the_user_edited():
    gm = ligerfx.optimize(nn.Sequential(nn.RMSNorm(64)), (torch.zeros(2, 64),))
    norm = gm[0]
    [call] = [n for n in norm.graph.nodes if n.op == "call_function"]
    with norm.graph.inserting_after(call):
        doubled = norm.graph.call_function(torch.mul, (call, 2))
    call.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    norm.recompile()
    assert "+    mul = torch.mul(" in str(ligerfx.diff(gm, "0"))


def test_diff_in_a_notebook_is_coloured_and_escaped(llama):
    html = ligerfx.diff(llama, "model.norm")._repr_html_()
    assert '<div class="plus">+    rms_norm = ' in html and '<div class="minus">-    pow_1' in html


@pytest.mark.parametrize("call", [ligerfx.diff, ligerfx.draw])
def test_modules_without_code(llama, call):
    with pytest.raises(LigerfxError, match="no rewritten code|no graph to draw"):
        call(llama, "model.embed_tokens")
    with pytest.raises(LigerfxError, match="no rewritten code|no graph to draw"):
        call(nn.Linear(2, 2))


def boxes(svg):
    """Title of each box -> (kind, left, top, right, bottom)."""
    root = ElementTree.fromstring(svg)
    found = {}
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        rect = group.find("{http://www.w3.org/2000/svg}rect")
        x, y, w, h = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
        name = group.find("{http://www.w3.org/2000/svg}title").text.split("\n")[0]
        found[name] = group.get("class"), x, y, x + w, y + h
    return root, found


def test_drawing_of_a_layer(llama):
    root, found = boxes(ligerfx.draw(llama, "model.layers.0").svg)
    kinds = [kind for kind, *_ in found.values()]
    assert kinds.count("fused") == 3 and kinds.count("module") == 1  # o_proj alone is still called
    _, _, _, width, height = 0, *map(float, root.get("viewBox").split())
    for (a, box), (b, other) in itertools.combinations(found.items(), 2):
        _, left, top, right, bottom = box
        _, left2, top2, right2, bottom2 = other
        assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top, (a, b)
        assert right - left <= width and bottom - top <= height
    assert found["hidden_states"][4] < found["rms_norm_linear"][2] < found["rms_norm_mlp"][2] < found["output"][2]
    text = "".join(root.itertext())
    assert "self_attn.q_proj.weight" in text and "[s0, s1, 64]" in text
    assert "size" not in found and not any(name.startswith("getitem") for name in found)


def test_drawing_stands_alone(llama, tmp_path):
    drawing = ligerfx.draw(llama, "model.layers.0.mlp")
    drawing.to_svg(tmp_path / "mlp.svg")
    assert (tmp_path / "mlp.svg").read_text(encoding="utf-8") == drawing.svg
    assert "href" not in drawing.svg and "prefers-color-scheme" in drawing.svg
    assert drawing.svg in drawing._repr_html_()


def test_edges_go_down_and_end_at_their_boxes():
    sizes = {name: (40.0 + 10 * i, 20.0 + i) for i, name in enumerate("abcdef")}
    edges = [("a", "b"), ("a", "e"), ("b", "c"), ("c", "e"), ("d", "e"), ("e", "f"), ("a", "f")]
    places, routes, (width, height) = layout(sizes, edges)
    assert len(routes) == len(edges)
    for (source, target), route in zip(edges, routes, strict=True):
        assert route[0] == (places[source][0], pytest.approx(places[source][1] + sizes[source][1] / 2))
        assert route[-1] == (places[target][0], pytest.approx(places[target][1] - sizes[target][1] / 2))
        heights = [y for _, y in route]
        assert heights == sorted(heights) and len(route) == len(set(route))
    assert places["d"][1] > places["a"][1]  # an input stands just above its use
    assert all(sizes[n][0] / 2 <= x + 1e-9 <= width - sizes[n][0] / 2 + 2e-9 for n, (x, _) in places.items())
    assert max(y + sizes[n][1] / 2 for n, (_, y) in places.items()) <= height + 1e-9

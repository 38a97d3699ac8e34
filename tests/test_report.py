"""The report: what it says as data, as text, as JSON and as a page."""

import copy
import io
import json
import pickle
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from idioms import ALMOST_INPUT, BranchesOnValues, almost
from rich.console import Console
from torch import nn

import ligerfx
from ligerfx.cost import Cost
from ligerfx.listing import Line, folded
from ligerfx.numerics import Verified
from ligerfx.report import Miss, Rewrite, verified_text
from models import make


@pytest.fixture(scope="module")
def llama():
    return ligerfx.optimize(make("llama", num_hidden_layers=32, device="meta"))


@pytest.fixture(scope="module")
def nearly():
    return ligerfx.optimize(almost(), (ALMOST_INPUT,))


class Page(HTMLParser):
    """Tags, classes and text of a page; fails where tags do not nest."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if "row" in (dict(attrs).get("class") or "").split():
            self.rows.append([dict(attrs)["class"].split()[1:], ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
            if self.rows:
                self.rows[-1][1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def test_page_of_32_layers_is_small_and_folded(llama):
    start = time.process_time()
    text = llama.report.to_html()
    assert time.process_time() - start < 2
    assert len(text.encode()) < 1_000_000
    page = Page(text)
    assert "0-31 x32 LlamaDecoderLayer" in page.text
    assert page.text.count("LlamaDecoderLayer") == 1
    assert "65/65 RMSNorm" in page.text and "98 calls" in page.text
    deeper = ligerfx.optimize(make("llama", num_hidden_layers=48, device="meta")).report.to_html()
    assert len(deeper) < len(text) + 200  # it does not grow with depth


def test_page_needs_nothing_else(llama):
    page = Page(llama.report.to_html())
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    for _, attributes in page.tags:
        assert not {"src", "href", "onclick"} & attributes.keys()
    text = llama.report.to_html()
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "data-jp-theme-light" in text and "vscode-dark" in text


def test_page_shows_code_before_and_after_with_the_models_lines(llama):
    page = Page(llama.report.to_html())
    assert "rms_norm_linear = ligerfx_kernels_rms_norm_linear(hidden_states, weight" in page.text
    assert "silu = torch.nn.functional.silu(gate_proj, inplace = False)" in page.text
    assert "hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)" in page.text
    assert "q: float32 [s0, 4, s1, 16]" in page.text and "s0 is size 0 of input_ids" in page.text
    assert "= None" not in "".join(text for _, text in page.rows if "; " in text)  # torch.fx's freeing


def test_a_call_is_marked_as_what_it_replaced(llama):
    rows = [row for row in Page(llama.report.to_html()).rows if row[0]]
    [call] = [classes for classes, text in rows if "ligerfx_kernels_rms_norm_mlp(" in text]
    replaced = [text for classes, text in rows if set(classes) & set(call) and " = ligerfx" not in text]
    assert any(text.startswith("silu = ") for text in replaced)
    assert any("down_proj(" in text for text in replaced)
    [rope] = [classes for classes, text in rows if "ligerfx_kernels_rope(" in text]
    assert set(rope).isdisjoint(call)
    assert not any("sdpa_attention" in text for _, text in rows)  # what stays belongs to no call
    style = llama.report._repr_html_()
    assert f".panel:has(.{call[0]}:hover" in style


def test_near_misses_on_the_page(nearly):
    text = nearly.report.to_html()
    page = Page(text)
    marked = [
        (attributes["class"], tag) for tag, attributes in page.tags if attributes.get("class") in ("plus", "minus")
    ]
    assert ("plus", "div") in marked and ("minus", "div") in marked
    assert "− add = mean + eps" in page.text and "+ pow_1 = x.pow(2)" in page.text
    assert "expected mean: (-1)" in page.text and "found mean: (-2)" in page.text
    assert "`silu` has a second user" in page.text
    assert "ligerfx_kernels" not in page.text


def test_text_for_a_terminal(nearly):
    plain = str(nearly.report)
    assert plain.startswith("Sequential: 0/2 RMSNorm, 0/1 GLU") and "near misses" in plain and "\x1b" not in plain
    assert repr(nearly.report) == plain
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=140)
    console.print(nearly.report)
    coloured = console.file.getvalue()
    assert "\x1b[32mmean(x**2, (-1))\x1b[0m, found \x1b[31mmean(x**2, (-1))**0.5\x1b[0m" in coloured


def test_text_of_the_model_is_escaped():
    class Odd(nn.Module):
        def forward(self, x):
            act = torch.nn.functional.silu(x)
            return act * x + act.mean()  # <script>alert("&")</script>

    text = ligerfx.optimize(nn.Sequential(Odd()), (ALMOST_INPUT,)).report.to_html()
    assert 'alert("&")' in Page(text).text
    assert "<script>" not in text


def test_differences_of_near_misses(nearly):
    assert [miss.difference for miss in nearly.report.near_misses] == [
        ("mean(x**2, (-1))", "mean(x**2, (-1))**0.5"),
        ("mean: (-1)", "mean: (-2)"),
        None,
    ]
    miss = Miss("p", "", ("i",), "f.py:1", "rounds at another place or differs in an attribute: expected a, found b")
    assert miss.difference == ("a", "b")
    assert replace(miss, reason="q and k differ in dtype").difference is None


def test_rewrites_tell_shapes_reach_and_constants(llama):
    by_pattern = {r.pattern: r for r in llama.report.rewrites if r.module == "model.layers.3"}
    norm = by_pattern["rms_norm_rounded_first_linear_x3"]
    assert norm.inputs["x"] == "float32 [s0, s1, 64]" and norm.inputs["weight1"] == "float32 [32, 64]"
    assert norm.constants == {"eps": pytest.approx(1e-6)}
    assert norm.reach == ("model.layers.3", "model.layers.3.input_layernorm", "model.layers.3.self_attn")
    assert norm.calls == ("rms_norm_linear",) and "q_proj" in norm.replaced
    assert llama.report.sizes == {"s0": "size 0 of input_ids", "s1": "size 1 of input_ids"}


def test_cost_of_a_norm_is_counted_by_hand():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))

        def forward(self, x):
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * h.to(torch.bfloat16)

    report = ligerfx.optimize(Norm(), (torch.zeros(2, 5, 64, dtype=torch.bfloat16),)).report
    full, half, one = 64 * 4, 64 * 2, 4  # float32 and bfloat16 rows, a float32 number
    # float, pow, mean, add, rsqrt, mul, to
    written = full + full + one + one + one + full + half
    # pow keeps h; rsqrt its result; h * r both; weight * h the rounded h
    kept = full + one + half
    before = (half + full) + 2 * full + (full + one) + 2 * one + 2 * one + (2 * full + one) + (full + half) + 2 * half
    assert report.cost == Cost(written, 0, kept, 0, before, 2 * half)
    assert report.rewrites[0].bytes_saved == written
    assert report.cost * 10 == Cost(10 * written, 0, 10 * kept, 0, 10 * before, 20 * half)


def test_logits_that_are_not_written_count():
    report = ligerfx.optimize(make("llama", torch.bfloat16, device="meta")).report
    loss = report.rewrites[0]
    assert loss.pattern == "logits_loss"
    vocab = 256
    assert loss.bytes_saved == vocab * 2 + vocab * 4  # in bf16, and their fp32 copy
    assert loss.cost.kept_before == vocab * 4 and loss.cost.kept_after == 0  # the log-probabilities


def test_low_memory_keeps_less():
    full, low = (ligerfx.optimize(make("llama", device="meta"), low_memory=low).report.cost for low in (False, True))
    layers, hidden, intermediate = 2, 64, 128
    assert full.kept_before == low.kept_before and low.kept_after == layers * 2 * intermediate * 4  # gate and up
    assert full.kept_after - low.kept_after == layers * intermediate * 4  # act(gate) * up
    # Two norms a layer, gate and up, and that: what the linear layers read and write, whatever is kept.
    assert full.written_after == low.written_after == layers * (2 * hidden + 3 * intermediate) * 4


def test_what_a_call_still_writes_is_not_saved():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))
            self.q, self.k = nn.Linear(64, 32, bias=False), nn.Linear(64, 16, bias=False)

        def forward(self, x):
            h = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            return self.q(h), self.k(h)

    (rewrite,) = ligerfx.optimize(Norm(), (torch.zeros(2, 5, 64),)).report.rewrites
    row, one = 64 * 4, 4
    written, outputs = 3 * row + 3 * one, (32 + 16) * 4  # pow, mul, mul; mean, add, rsqrt
    assert rewrite.cost.written_before == written and rewrite.cost.written_after == row  # once, for both
    assert rewrite.bytes_saved == written - row
    assert rewrite.cost.moved_after == row + row + 2 * row + outputs  # x; h written, and read twice


def test_json(llama, nearly, tmp_path):
    data = json.loads(llama.report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == data
    assert data["idioms"] == {"rms_norm": 65, "rope": 32, "glu": 32, "linear_cross_entropy": 1}
    assert len(data["rewrites"]) == 98
    first = data["rewrites"][0]
    assert first["pattern"] == "logits_loss" and first["constants"]["ignore_index"] == -100
    misses = json.loads(nearly.report.to_json())["near_misses"]
    assert [m["found"] for m in misses] == ["mean(x**2, (-1))**0.5", "mean: (-2)", None]


def test_notebooks_show_the_report(llama, nearly, tmp_path):
    assert llama._repr_html_() == llama.report._repr_html_()
    assert llama.model.layers[0]._repr_html_() is None
    assert llama.report.to_html(tmp_path / "r.html") == (tmp_path / "r.html").read_text(encoding="utf-8")
    # Several reports in one notebook: nothing on the page is found by an id.
    assert not any("id" in attributes for _, attributes in Page(nearly.report._repr_html_()).tags)


def test_verified_errors_have_a_place(llama):
    report = replace(
        llama.report, rewrites=[replace(r, verified=Verified(forward=2e-7)) for r in llama.report.rewrites]
    )
    assert "forward 2.0e-07" in str(report) and "forward 2.0e-07" in report.to_html()
    assert "verified" not in str(llama.report) and "verified" not in Page(llama.report.to_html()).text
    assert verified_text(Rewrite("p", "", (), (), 0)) == ""


def test_report_survives_copy_and_pickle(nearly):
    assert copy.deepcopy(nearly).report is nearly.report
    loaded = pickle.loads(pickle.dumps(nearly.report))
    assert loaded == nearly.report
    assert "0/2 RMSNorm" in Page(loaded.to_html()).text


def test_opaque_modules_on_the_page():
    with pytest.warns(UserWarning, match="nothing in Sequential was rewritten"):
        gm = ligerfx.optimize(nn.Sequential(BranchesOnValues(), nn.Linear(64, 64)), (ALMOST_INPUT,))
    page = Page(gm.report.to_html())
    assert "not captured" in page.text and "branches on the values of a tensor" in page.text
    assert "nothing rewritten" in page.text


def test_alike_lines_fold_and_others_do_not():
    layers = [Line(f"h_{i} = self.layers_{i}(h_{i - 1}, mask)", f"h_{i}", "m.py:3") for i in range(1, 33)]
    other = [Line("a = x + 1", "a", "m.py:4"), Line("b = x + 2", "b", "m.py:5")]
    assert list(folded([*layers, *other])) == [(layers[0], 31), (other[0], 0), (other[1], 0)]
    assert len(list(folded(layers[:3]))) == 3  # too few to be worth it
    by_call = list(folded(layers, same=lambda line: line.name == "h_7"))
    assert [more for _, more in by_call] == [5, 0, 24]


def test_layers_that_differ_are_not_folded():
    gm = ligerfx.optimize(make("gemma3", num_hidden_layers=6, device="meta"))
    layers = [m for m in gm.report.modules.walk() if m.cls == "Gemma3DecoderLayer"]
    assert sum(m.count for m in layers) == 6
    for entry in layers:
        assert entry.count == 1 or entry.name.endswith(f"-{int(entry.path.split('.')[-1]) + entry.count - 1}")

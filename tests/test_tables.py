"""The published tables: every figure agrees with ours or differs for a reason that a recount confirms."""

import json
from dataclasses import replace

import pytest

from flyweight.cli import app
from flyweight.errors import FlyweightError
from flyweight.tables import Row, rows
from scripts.models_page import COST_PAGE, with_tables


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return rows()


def row(published: str, ours: float, why: str = "", recount: float | None = None) -> Row:
    return Row("a paper, table 1", "a net: MACs", "M", published, ours, why, recount)


@pytest.mark.parametrize(
    ("published", "ours", "agrees"),
    [
        ("569", 568.74, True),
        ("569", 569.51, False),
        ("4.24", 4.2353, True),
        ("4.24", 4.232, False),
        ("0.02", 0.0204, True),
    ],
)
def test_a_figure_agrees_at_the_precision_in_which_it_is_printed(published: str, ours: float, agrees: bool) -> None:
    assert row(published, ours).agrees is agrees
    assert row(published, ours).holds is agrees
    assert row(published, ours).difference == pytest.approx(ours - float(published))


def test_a_reason_excuses_a_difference_unless_its_recount_differs_too() -> None:
    assert row("317", 325.4, "without the first convolution", 317.27).holds
    assert row("7.7", 6.06, "not explained").holds
    assert not row("317", 325.4, "without the first convolution", 318.2).holds
    assert not row("317", 325.4).holds


def test_every_row_holds(found: list[Row]) -> None:
    assert [each for each in found if not each.holds] == []
    assert len({(each.source, each.what) for each in found}) == len(found)


def test_a_reason_is_given_where_it_is_needed_and_nowhere_else(found: list[Row]) -> None:
    assert all(each.agrees is not bool(each.why) for each in found)


def test_all_tables_are_there(found: list[Row]) -> None:
    sources = {each.source for each in found}
    for paper, tables in {"1704.04861": 3, "1707.01083": 2, "1602.07360": 4}.items():
        assert sum(paper in source for source in sources) == tables
    assert {"MobileNetV1 checkpoints", "ShuffleNetV1 code", "google-research/receptive_field"} < sources


def test_squeezenet_is_the_papers_layer_by_layer(found: list[Row]) -> None:
    layers = [each for each in found if each.source.endswith("1602.07360), table 1")]
    assert all(each.ours == int(each.published) for each in layers)
    assert sum(each.ours for each in layers[:-1]) == layers[-1].ours == 1_248_424


def test_figures_for_several_nets_are_near_each(found: list[Row]) -> None:
    """Table 2 of ShuffleNet has one figure for the nets of all group numbers: no reason to be far from it."""
    scales = [each for each in found if each.source.endswith("1707.01083), table 2")]
    assert len(scales) == 15
    assert all(abs(each.difference) <= 0.16 * float(each.published) for each in scales)


def test_only_the_papers_own_slips_stay_unexplained(found: list[Row]) -> None:
    assert [each.what for each in found if "not explained" in each.why] == ["bypass: complex: size"]


def test_the_page_on_cost_has_the_tables(found: list[Row]) -> None:
    text = COST_PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text, found), "python -m scripts.models_page writes them anew"
    changed = [replace(found[0], ours=0.0), *found[1:]]
    assert text != with_tables(text, changed)


def test_the_command_prints_them(
    found: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flyweight.tables.rows", lambda: found)
    app(["tables", "--check", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == [each.to_json() for each in found]
    app(["tables"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "MobileNet_v1_0.75_224" in text
    assert "all at 0.75 leave out the first convolution" in text
    assert f"{sum(each.agrees for each in found)} of {len(found)} figures" in text


def test_the_command_fails_where_a_figure_differs_without_a_reason(
    found: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flyweight.tables.rows", lambda: [*found, row("317", 325.4)])
    app(["tables"], standalone_mode=False)
    with pytest.raises(FlyweightError, match=r"a net: MACs, 317 M .* 325\.4") as failure:
        app(["tables", "--check"], standalone_mode=False)
    assert failure.value.exit_code == 1

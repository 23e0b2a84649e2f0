"""tools/bench.py works: it measures what it says, and prints tables. Nothing here is about speed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, run_process


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tools" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    return module


def run_bench(*arguments: str) -> str:
    done = run_process([sys.executable, str(ROOT / "tools" / "bench.py"), *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_help_names_every_topic(bench: ModuleType) -> None:
    said = run_bench("--help")
    assert all(topic in said for topic in bench.TOPICS)


def test_bench_unknown_topic_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench.py"), "speed"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2 and "speed is no topic" in done.stderr


@pytest.mark.parametrize(
    ("topic", "rows"),
    [
        ("latency", ("**mxcp_audit**", "QueueHandler, JSON formatter", "sqlite3")),
        ("middleware", ("memory, the first time", "http, again")),
        ("strict", ("**strict**", "two rows in SQLite (WAL)")),
        ("ingest", ("the `duckdb` program", "DuckDB alone", "while it ingests")),
        ("ending", ("log one event and out", "2 workers, the database held for 1.5 s")),
    ],
)
def test_bench_tiny_run_of_a_topic_prints_its_rows(topic: str, rows: tuple[str, ...]) -> None:
    said = run_bench(topic, "--tiny", "--here", "--only", "queue-json", "sqlite")
    for row in rows:
        assert f"| {row}" in said
    assert "events arrived" not in said, "an event was lost or recorded twice"
    assert f"tools/bench.py {topic} --tiny" in said


def test_plot_draws_every_point_of_every_series(bench: ModuleType) -> None:
    table = bench.Plotted("t", ("rows", "fast", "slow"), x_title="rows", y_title="ms")
    for power in range(4):
        table.add(10**power, 1.5, 2.0**power)
    tree = ElementTree.fromstring(bench.plot(table))
    assert sum(element.tag.endswith("circle") for element in tree.iter()) == 8
    heights = [float(e.attrib["cy"]) for e in tree.iter() if e.tag.endswith("circle")]
    assert len(set(heights[:4])) == 1, "what stays the same is a level line"
    assert heights[4:] == sorted(heights[4:], reverse=True), "what grows rises"


def test_write_section_replaces_its_own_text_only(bench: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- bench x -->\nold\n<!-- end x -->\nb\n<!-- bench y -->\nkept\n<!-- end y -->\n")
    bench.write_section("x", "new\n", page)
    assert page.read_text() == (
        "a\n<!-- bench x -->\nnew\n<!-- end x -->\nb\n<!-- bench y -->\nkept\n<!-- end y -->\n"
    )
    with pytest.raises(SystemExit, match="marks of z are missing"):
        bench.write_section("z", "new\n", page)


def test_quantile_of_known_values_is_exact(bench: ModuleType) -> None:
    values = list(range(1, 1001))
    assert [bench.quantile(values, share) for share in (0.5, 0.99, 0.999)] == [500, 990, 999]


def test_performance_page_has_a_place_for_every_topic(bench: ModuleType) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for topic in bench.TOPICS:
        assert f"<!-- bench {topic} -->\n" in page and f"<!-- end {topic} -->" in page

"""The site builds, strictly, and all that it links to is there, on the site and on a code host."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from flags import FLAGS
from pages import PAGES, ROOT, without_fences

pytestmark = pytest.mark.slow


def build(site: Path, config: Path = ROOT / "docs" / "site" / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    path = tmp_path_factory.mktemp("site")
    result = build(path)
    assert result.returncode == 0, result.stderr
    return path


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(given["href"])
        elif "src" in given:
            self.loaded.append(given["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_and_anchor_is_there(site: Path, pages: dict[Path, Page]) -> None:
    """Those of the generated pages and of the links to flags as well, which MkDocs does not check."""
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if re.match("[a-z]+:", target):
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            assert file.is_file(), f"{path.relative_to(site)} links to {link}"
            if anchor and file in pages:
                assert unquote(anchor) in pages[file].anchors, f"{path.relative_to(site)} links to {link}"
            checked += 1
    assert checked > 1000


def test_nothing_comes_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    """So that the site works without a network."""
    for path, page in pages.items():
        for source in page.loaded:
            assert not re.match("([a-z]+:)?//", source), f"{path.relative_to(site)} loads {source}"
            assert (path.parent / urldefrag(source)[0].partition("?")[0]).is_file(), source


def test_every_flag_is_in_the_reference(pages: dict[Path, Page], site: Path) -> None:
    page = site / "reference" / "flags.html"
    text = unescape(re.sub("<[^>]*>", "", page.read_text()))
    assert FLAGS.keys() <= pages[page].anchors
    for name, flag in FLAGS.items():
        entry = text.split(f"--{name}¶")[1].split("¶")[0]
        if flag.default is dataclasses.MISSING:
            assert "; required" in entry
        elif flag.default not in (None, dataclasses.MISSING):
            shown = getattr(flag.default, "value", flag.default)
            assert f"; default {str(shown).lower() if isinstance(shown, bool) else shown}" in entry
        words = flag.metadata["help"].replace("`", "").split()
        assert " ".join(words[:6]) in " ".join(entry.split()), name
    assert "--trust_remote_code" in text.split("lopt-pp export¶")[1], "the flags of the other commands"


def test_flags_in_the_text_lead_to_the_reference(pages: dict[Path, Page], site: Path) -> None:
    assert "reference/flags.html#queue_depth" in pages[site / "pipeline.html"].links


def test_the_python_reference_has_what_the_package_exports(pages: dict[Path, Page], site: Path) -> None:
    import lopt_pp

    anchors = pages[site / "reference" / "python.html"].anchors
    assert {f"lopt_pp.{name}" for name in lopt_pp.__all__} <= anchors
    assert not [anchor for anchor in anchors if re.search(r"\._[a-z]", anchor)], "private names"


def test_links_out_of_the_docs_show_the_files(site: Path) -> None:
    assert "MAX_RESTARTS" in (site / "source" / "launch" / "torchrun" / "one_machine.sh.html").read_text()


def test_a_broken_page_fails_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    for name in ("launch", "tests", "benchmarks", "lopt_pp", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (docs / "stray.md").write_text("[a](gone.md) [b](method.md#gone) [c](../launch/gone.sh)\n")
    result = build(tmp_path / "site", docs / "site" / "mkdocs.yml")
    assert result.returncode != 0
    for problem in (
        "'gone.md', but the target is not found",
        "method.md#gone",
        "launch/gone.sh, which is not in the repository",
        'not included in the "nav" configuration',
    ):
        assert problem in result.stderr, result.stderr


def slug(heading: str) -> str:
    """The anchor that a code host gives a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def test_links_of_the_sources_work_on_a_code_host() -> None:
    for file in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(file.read_text())):
            target, anchor = urldefrag(link)
            if re.match("[a-z]+:", target):
                continue
            path = (file.parent / target).resolve() if target else file
            assert path.exists(), f"{file.name} links to {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                assert anchor in map(slug, headings), f"{file.name} links to {link}"

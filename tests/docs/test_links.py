"""Every Markdown page renders as it is meant, and its relative links and anchors lead somewhere."""

import itertools
import re

import pytest
from markdown_it import MarkdownIt  # comes with rich

from helpers.source import ROOT

PAGES = sorted(
    page
    for pattern in ("*.md", ".github/*.md", "docs/*.md", "csrc/*.md", "icae_fast/adapters/*/*.md", "tests/data/**/*.md")
    for page in ROOT.glob(pattern)
)
MARKDOWN = MarkdownIt("commonmark").enable("table")


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    tokens = MARKDOWN.parse(page.read_text())
    titles = [
        "".join(part.content for part in text.children if part.type in ("text", "code_inline"))
        for heading, text in itertools.pairwise(tokens)
        if heading.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def complaint(page, link):
    """Return what is wrong with a link of a page, None if it leads somewhere."""
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    if not target.exists():
        return f"{link}: there is no {file}"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"{link}: {target.name} has no such heading"
    return None


def page_name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_to_files_and_headings(page):
    links = re.findall(r'(?:href|src|srcset)="([^"]+)"', MARKDOWN.render(page.read_text()))
    wrong = [complaint(page, link) for link in links if not re.match(r"(https?|mailto):", link)]
    assert [sentence for sentence in wrong if sentence] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_table_renders_as_text(page):
    paragraphs = re.findall(r"<p>(.*?)</p>", MARKDOWN.render(page.read_text()), flags=re.DOTALL)
    assert [text for text in paragraphs if re.search(r"\|\s*:?-{3}", text)] == []


def test_wrong_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title, with `code`\n\n[a](page.md#a-title-with-code) [b](#other) [c](none.md)\n")
    assert complaint(page, "page.md#a-title-with-code") is None
    assert complaint(page, "#other") == "#other: page.md has no such heading"
    assert complaint(page, "none.md") == "none.md: there is no none.md"


def test_the_main_pages_are_among_them():
    assert {"README.md", "CONTRIBUTING.md", "docs/design.md", "csrc/README.md"} <= set(map(page_name, PAGES))

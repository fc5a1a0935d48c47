"""The nodes in every language: help pages and locales say the same, and call nodes by the names that the page shows."""

import json
import re

import pytest

from conftest import ROOT

PAGES = ROOT / "web" / "docs"
TEXTS = {
    folder.name: json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
    for folder in sorted((ROOT / "locales").iterdir())
}
NODES = sorted(TEXTS["zh"])
ROOMS = ("nodes", "serving", "adapters", "kvae")
QUOTED = {"zh": r"“([^”]+)”", "ru": r"«([^»]+)»"}
OF_COMFYUI = {  # node names in its own pages, as of the frontends 1.35.9 and 1.49.6
    "zh": {"加载VAE", "保存VAE", "VAE解码", "VAE解码（分块）", "VAE编码", "加载Latent"},
    "ru": {
        "Загрузить VAE",
        "Сохранить VAE",
        "Декодировать VAE",
        "Декодировать VAE (плитками)",
        "Кодировать VAE",
        "Загрузить латент",
    },
}


def english(node: str) -> str:
    return (PAGES / f"{node}.md").read_text(encoding="utf-8")


def translated(node: str, language: str) -> str:
    """The page that ComfyUI asks for first; it shows the English one if there is none."""
    return (PAGES / node / f"{language}.md").read_text(encoding="utf-8")


def structure(page: str) -> dict[str, list]:
    """What a translation keeps: headings, links and pictures, rows of tables, lists and paragraphs, code."""
    return {
        "headings": re.findall(r"^#+ ", page, re.MULTILINE),
        "links": re.findall(r"\]\(([^)]+)\)", page),
        "blocks": [line[:1] in "|-" and line[:1] for line in page.splitlines() if line],
        "cells": [line.count("|") for line in page.splitlines()],
        "code": sorted(re.findall(r"`([^`]+)`", page)),
    }


def test_every_language_has_every_node_and_every_page():
    assert set(QUOTED) == set(OF_COMFYUI) == set(TEXTS)
    for language, texts in TEXTS.items():
        assert sorted(texts) == NODES, language
    assert sorted(page.stem for page in PAGES.glob("*.md")) == NODES
    pages = {f"{node}/{language}.md" for node in NODES for language in TEXTS}
    assert {page.relative_to(PAGES).as_posix() for page in PAGES.glob("*/*.md")} == pages


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("node", NODES)
def test_a_translated_page_has_the_structure_of_the_english_one(node, language):
    page = translated(node, language)
    assert structure(page) == structure(english(node))
    assert page.splitlines()[0] == f"# {TEXTS[language][node]['display_name']}"


@pytest.mark.parametrize("node", NODES)
def test_a_page_shows_a_picture_that_exists(node):
    """ComfyUI resolves addresses from web/docs, in whatever folder the page is."""
    for link in structure(english(node))["links"]:
        assert link.startswith("https://") or (PAGES / link).is_file(), link
    assert len(re.findall(r"!\[[^]]+\]\(", english(node))) == 1


@pytest.mark.parametrize("language", TEXTS)
def test_nodes_are_called_by_the_names_that_the_page_shows(language):
    known = {text["display_name"] for text in TEXTS[language].values()} | OF_COMFYUI[language]
    texts = [json.dumps(TEXTS[language], ensure_ascii=False), *(translated(node, language) for node in NODES)]
    for text in texts:
        assert set(re.findall(QUOTED[language], text)) <= known


OTHER_WORDS = {  # for what has one name in these texts
    "zh": r"潜变量|潜空间|(加载|保存) K?VAE|“K?VAE (编码|解码)|封装节点包|编码格式",
    "ru": r"\b[Пп]акет|[Оо]смотр|отобража|масштаб\b|пережж",
}


@pytest.mark.parametrize("language", TEXTS)
def test_one_thing_has_one_name(language):
    """ComfyUI's own name where it has one, in every text; no English name of a node in a translation."""
    titles = [english(node).splitlines()[0].removeprefix("# ") for node in NODES]
    others = re.compile("|".join([OTHER_WORDS[language], *map(re.escape, titles), "Load VAE", "VAE (De|En)code"]))
    for text in (json.dumps(TEXTS[language], ensure_ascii=False), *(translated(node, language) for node in NODES)):
        assert not others.search(text), others.search(text)


@pytest.mark.parametrize("language", TEXTS)
def test_pages_call_settings_by_the_names_that_the_node_shows(language):
    """A word in *emphasis* is a setting or an output of this language, or a value, which is the same in all."""
    for node in NODES:
        words = re.compile(r"(?<!\*)\*([^*]+)\*(?!\*)")
        values = set(words.findall(english(node)))
        slots = [*TEXTS[language][node]["inputs"].values(), *TEXTS[language][node]["outputs"].values()]
        names = {re.split(r" \(|,", slot["name"])[0] for slot in slots}
        for word in words.findall(translated(node, language)):
            assert word in values or re.split(r" \(|,|[:：]", word)[0] in names, f"{node}: {word}"


OF_OTHERS = ("KeyError", "The expanded size")  # how errors of ComfyUI and PyTorch begin
# Filled into messages when they are raised
INSERTED = ("a HunyuanVideo VAE", "a KVAE-3D VAE", "an image latent", "musubi-tuner cache of")
INSERTED += ("hunyuan_video_1.5", "encode", "frames")


def test_errors_are_quoted_as_they_are_raised():
    """What docs/comfyui.md quotes of an error, between its dots, is in the source files."""
    sources = [path.read_text(encoding="utf-8") for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    source = re.sub(r"[\"']\n\s*f?[\"']", "", "\n".join(sources))  # texts of several lines
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    rows = page.split("| what you see |")[1].split("\n\n")[0].splitlines()
    quoted = [quote for row in rows[2:] for quote in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(quoted) > 10
    for quote in quoted:
        for part in re.split(f"…|({'|'.join(INSERTED)})", quote):
            assert (part or "").strip() in source or quote.startswith(OF_OTHERS), f"{quote}: {part}"

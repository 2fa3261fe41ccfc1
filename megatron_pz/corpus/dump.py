"""Pages of a Wikipedia XML dump (`.xml.bz2`, one stream or many, or `.xml`), as bytes, without holding the file.

A page is cut out by its tags: in a dump `<` stands escaped in every text. What a broken file gave before it broke is kept.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from megatron_pz.errors import CorpusError

BLOCK = 1 << 18


class DumpBroken(CorpusError):
    """The file ends or is damaged before its end. All whole pages before that have been read."""


def decompressed(path: Path) -> Iterator[bytes]:
    """The bytes of `path`, decompressed where its name ends in `.bz2`.

    Raises:
        DumpBroken: the file ends in the middle of a stream, or is no bzip2 from some byte on.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".bz2":
            while block := file.read(BLOCK):
                yield block
            return
        decoder, rest = bz2.BZ2Decompressor(), b""
        fresh = True  # nothing of the present stream was read
        while block := rest or file.read(BLOCK):
            try:
                out = decoder.decompress(block)
            except OSError as error:
                raise DumpBroken(f"{path} is no bzip2 near byte {file.tell()} of {size}: {error}") from error
            fresh, rest = False, b""
            if out:
                yield out
            if decoder.eof:
                rest, decoder, fresh = decoder.unused_data, bz2.BZ2Decompressor(), True
        if not fresh:
            raise DumpBroken(f"{path} ends in the middle of a bzip2 stream, at byte {size}")


def raw_pages(path: Path) -> Iterator[bytes]:
    """Each `<page>...</page>`, after one item that is what stands before the first page (the site's description).

    Raises:
        DumpBroken: as `decompressed`, or the file ends without `</mediawiki>`; the title of the last whole page is told.
    """
    held, last, is_head = b"", b"", True
    try:
        for block in decompressed(path):
            held += block
            while (end := held.find(b"</page>")) >= 0:
                start = held.find(b"<page>")
                if start < 0 or start > end:
                    raise DumpBroken(f"{path} has a page without a beginning")
                if is_head:
                    yield held[:start]
                    is_head = False
                last = held[start : end + 7]
                yield last
                held = held[end + 7 :]
        if b"</mediawiki>" not in held:
            raise DumpBroken(f"{path} ends without </mediawiki>")
    except DumpBroken as error:
        title = re.search(rb"<title>(.*?)</title>", last)
        after = f"after the page {title.group(1).decode('utf-8', 'replace')!r}" if title else "before its first page"
        raise DumpBroken(f"{error}; {after}. What stands before is kept; fetch the file anew for the rest.") from error


def parse_page(raw: bytes) -> tuple[str, str, str, bool, str]:
    """(id, title, namespace, is a redirect, wikitext) of one page."""
    page = ElementTree.fromstring(raw)
    text = page.findtext("revision/text") or ""
    return (
        page.findtext("id") or "",
        page.findtext("title") or "",
        page.findtext("ns") or "0",
        page.find("redirect") is not None or text.lstrip()[:9].upper() == "#REDIRECT",
        text,
    )


def site(head: bytes) -> tuple[str, str, str, tuple[str, ...]]:
    """(database name, base address, language, names of the namespaces of files and categories) out of a dump's head."""
    text = head.decode("utf-8", "replace")

    def first(pattern: str, default: str) -> str:
        found = re.search(pattern, text)
        return found.group(1) if found else default

    names = re.findall(r'<namespace key="(?:6|14)"[^>]*>([^<]+)<', text)
    base = first(r"<base>(.*?)/wiki/", "https://en.wikipedia.org")
    name = first(r"<dbname>(.*?)</dbname>", "wiki")
    return name, base, first(r'xml:lang="([^"]+)"', ""), (*names, "File", "Image", "Category")

"""The reader of reads itself."""

from __future__ import annotations

from pathlib import Path

from tests.keys.reads import Reads


def test_the_reader_finds_an_unread_key(tmp_path: Path) -> None:
    """The oracle itself: a key only checked, and one in a method nobody calls, are not live; a typed read is."""
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "nodes.py").write_text(
        "class Stated:\n"
        "    def check(self, where): return self.name\n"
        "    def machine(self): return self.devices\n"
        "    def never(self): return self.accelerator\n"
        "def plan(hardware: Stated, other):\n"
        "    other.memory_bytes\n"
        "    return hardware.machine()\n"
    )
    from lmforge.hardware.nodes import Stated

    found = Reads.of(tmp_path)
    assert [found.live(Stated, key) for key in ("devices", "name", "accelerator", "memory_bytes")] == [True, False, False, False]

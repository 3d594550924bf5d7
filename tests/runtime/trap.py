"""A plugin with a learning-rate schedule that goes wrong where the test says: an installed package, as a user's would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SOURCE = '''
import json, os, signal, time
from pathlib import Path
from lmforge.errors import DataError
from lmforge.optimizer.schedule import Constant
from lmforge.registry import register

@register("optimizer/schedule", "trap")
class Trap(Constant):
    """Constant, but for what traps.json says."""

    def factor(self, step, steps):
        for trap in json.loads(Path("traps.json").read_text()):
            if step == trap["step"] and os.environ.get("RANK", "0") == str(trap["rank"]) and not Path(trap["once"]).exists():
                Path(trap["once"]).touch()
                getattr(self, trap["how"])()
        return super().factor(step, steps)

    def refuse(self):
        raise DataError("rows.jsonl:7", "is not a row", "mend it")

    def fail(self):
        raise ValueError("a foreign error\\nand more of it")

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self):
        """As a scheduler does: to the process that was started."""
        os.kill(os.getppid() if "RANK" in os.environ else os.getpid(), signal.SIGTERM)

    def hang(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as in a collective, where no handler runs
        time.sleep(1000)
'''


def install(site: Path) -> Path:
    """Lay the package out as pip would; returns `site`, for PYTHONPATH."""
    package, info = site / "lmforge_trap", site / "lmforge_trap-1.dist-info"
    (package / "conf/optimizer/schedule").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(SOURCE)
    (package / "conf/optimizer/schedule/trap.yaml").write_text("type: trap\nwarmup: 0.0\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lmforge-trap\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lmforge.plugins]\ntrap = lmforge_trap\n")
    return site


def lay(cwd: Path, *traps: dict[str, Any]) -> None:
    """What goes wrong in runs in `cwd` from now on: at which step, on which rank, how; each happens once."""
    for old in cwd.glob("sprung*"):
        old.unlink()
    (cwd / "traps.json").write_text(json.dumps([{"once": f"sprung{number}", **trap} for number, trap in enumerate(traps)]))

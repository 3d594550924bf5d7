"""The machine that a plan is made for, with what `lmforge calibrate` measured on it."""

from __future__ import annotations

from lmforge.hardware.calibration import calibrated, strangers
from lmforge.hardware.nodes import Machine
from lmforge.plan import Plan


def machine_of(plan: Plan) -> Machine:
    """The stated or detected one; ConfigError for a calibration that is none."""
    return calibrated(plan.experiment.hardware.machine(), plan.experiment.output)[0]


def warning(plan: Plan) -> str:
    """A line on a calibration that is not used, for it is of another machine; '' where there is nothing to say."""
    machine, output = plan.experiment.hardware.machine(), plan.experiment.output
    said = calibrated(machine, output)[1]
    return said or (strangers(machine, output) if plan.experiment.hardware.type == "here" else "")

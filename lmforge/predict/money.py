"""What a stage's steps take in hours, device-hours, money and energy."""

from __future__ import annotations

from dataclasses import dataclass

from lmforge.hardware.nodes import Machine
from lmforge.predict.time import StepTime


@dataclass(frozen=True)
class Bill:
    """Of all steps at the predicted time; starting, saving and stops are not in it. Null is not known."""

    hours: float
    device_hours: float
    money: float | None  # in the currency of hardware.price_per_device_hour
    energy_kwh: float | None  # of the devices at power_watts; cooling and the rest of the node are not in it


def bill(step: StepTime, steps: int, machine: Machine) -> Bill:
    """`steps` steps on `step.devices` devices."""
    hours = step.total * steps / 3600
    used = hours * step.devices
    money = None if machine.price_per_device_hour is None else used * machine.price_per_device_hour
    energy = None if machine.power_watts is None else used * machine.power_watts / 1000
    return Bill(hours, used, money, energy)

"""Clouds simulated on one machine, for the real SkyPilot: see README.md beside this file."""

from simcloud.sim import Instance, SimCloud, SimUnavailable

__all__ = ["Instance", "SimCloud", "SimUnavailable"]

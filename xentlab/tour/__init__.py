"""The argument as a walk: what an experiment found, station by station, beside what is expected, and the page that shows it."""

from xentlab.tour.station import Check, Figure, Slider, Station, show

__all__ = ["Check", "Figure", "Slider", "Station", "show"]

"""Values of a record against the table of metrics."""

from megatron_pz.report.metrics import METRICS


def out_of_range(metrics):
    """A sentence for each known metric whose value cannot be, e.g. a share over 1. NaN is out of every range."""
    return [
        f"{name} is {value:g}, range {row.low:g} to {row.high:g}"
        for name, value in metrics.items()
        if value is not None and (row := METRICS.get(name)) is not None and not row.low <= value <= row.high
    ]

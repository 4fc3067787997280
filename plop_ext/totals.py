"""The fields of a totals table: what the kernels add up per module and sample."""

TOTALS_FIELDS = ("sum_gain", "sum_gain_sq", "tokens", "skipped_zero", "skipped_nonfinite")

"""Which tile and which library: screened without a GPU, measured with one. See docs/tuning.md."""

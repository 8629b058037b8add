"""The methods: one algorithm a file, pure functions on tensors in the notation of the paper."""

"""Pure PyTorch, one op a file: what each op means, exactly; also its implementation on the CPU."""

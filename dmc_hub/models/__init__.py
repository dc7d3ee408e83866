"""Networks: denoisers, critics and the normaliser. Each file is self-contained, because it travels to the Hub."""

"""What the kernels must cost, predicted from machine code, bytes and data sheets; nothing is measured here."""

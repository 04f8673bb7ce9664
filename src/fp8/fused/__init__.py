"""Operations joined with the quantization of their result: for each a reference and a kernel under one name."""

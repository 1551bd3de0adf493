"""What a model can do: needles in haystacks of pages, held-out questions, adapters to public
harnesses."""

"""From logits to text: sampling, beam search, incremental detokenization."""

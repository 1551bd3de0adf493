"""Words: tokenizers, conversations, chat templates and the placeholder sequences of images and
videos.

Everything here is a pure function of text and numbers. Turns are tokenized one by one and media are
counted from their sizes alone, so the length of a document follows from metadata without tokenizing
or decoding anything again.
"""

"""The small demo: easy-VQA, from the published questions to answers about unseen images."""

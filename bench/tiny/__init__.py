"""The parts of `bench/train_tiny.py`: corpus, tokenizer, training, evaluation, model card."""

"""Writes a tiny BERT with random weights, and a tokenizer that knows the words of reviews.tsv, to the folder `tiny`."""

import re
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

text = (Path(__file__).parent / "reviews.tsv").read_text()
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(re.findall(r"[a-z]+|[.,]", text)))]
BertTokenizer({word: number for number, word in enumerate(words)}).save_pretrained("tiny")

torch.manual_seed(0)
config = BertConfig(
    vocab_size=len(words),
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=64,
)
BertForSequenceClassification(config).save_pretrained("tiny")
print(f"tiny: {len(words)} words")

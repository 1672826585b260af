"""Loads a model from a folder and counts how many held-out sentences it gets right."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ds_compress  # noqa: F401  transformers then loads our exports, too

folder = sys.argv[1]
lines = [line.split("\t") for line in (Path(__file__).parent / "reviews.tsv").read_text().splitlines()][:100]
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer([text for _, text in lines], padding=True, return_tensors="pt")
with torch.no_grad():
    predicted = model(**batch).logits.argmax(-1)
right = sum(int(label) == guess for (label, _), guess in zip(lines, predicted.tolist(), strict=True))
size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
print(f"{folder}: {right} of {len(lines)} right, {size / 1000:.0f} kB")

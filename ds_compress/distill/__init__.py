"""Distillation: one small class per loss, and the activations that they need from a forward pass.

losses               one file per loss
activation_capture, attention_scores, projections   what is captured of a forward
lazy_logits, lazy_head, chunked_head, pending_loss  logits of language models, a chunk at a time
divergence, sparse_logits   of predictions
compatibility        whether student and teacher fit together
teacher              the protocol of teachers; cache_write, cache_read, cache_format: stored predictions of one
teacher_text, text_data     data for teachers
"""

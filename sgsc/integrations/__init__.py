"""Callbacks for trainers that have a loop of their own; each module needs its library, and only when it is imported.

huggingface  `SGSCCallback`, `Logits`: transformers' Trainer
lightning    `SGSCCallback`: Lightning's Trainer
"""

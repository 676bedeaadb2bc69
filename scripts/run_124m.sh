#!/usr/bin/env bash
# GPT-2 124M on one GPU:  scripts/run_124m.sh [adamw|sgd_sai] [--dry-run] [flags of train_gpt2]
# How it is used otherwise: scripts/run.sh.
#
#   parameters   124,439,808 (12 layers, 768 channels)
#   tokens       1e10: 19,073 updates of 524,288; 80 a parameter
#   FLOP         8.03e8 a token (6 N + 6 L C T), 8.03e18 in all
#   memory       23.2 GiB with AdamW, 22.7 GiB with SGD-SaI, at 64 sequences a micro-step
#   time         5.64 hours on one H100 at 40% of its 989 TFLOP/s: $14 at $2.50 an hour
#
# The share of the peak and the price are assumptions, not measurements; MFU=0.5 PRICE=3 scripts/run_124m.sh
# --dry-run computes with yours. Validation (1 M tokens every 250 updates) adds under 1%. 10 billion tokens
# are what llm.c's 124M run took; OpenWebText holds 9.0 billion. AdamW's settings are the usual ones of this
# size (Brown et al. 2020, table 2.1, gives this rate). SGD-SaI's rate is where to begin, untuned: try 3e-4
# .. 3e-2 too, and with each --weight-decay 6e-5 / rate.
name=124m model=d12 parameters=124439808 layers=12 channels=768
batch=64 total=524288 steps=19073
adamw=(--learning-rate 6e-4 --weight-decay 0.1)
sgd_sai=(--learning-rate 3e-3 --weight-decay 0.02)
source "$(dirname "$0")/run.sh"

#!/usr/bin/env bash
# GPT-2 350M on one GPU:  scripts/run_350m.sh [adamw|sgd_sai] [--dry-run] [flags of train_gpt2]
# How it is used otherwise: scripts/run.sh.
#
#   parameters   354,823,168 (24 layers, 1024 channels)
#   tokens       7.1e9: 13,536 updates of 524,288; 20 a parameter
#   FLOP         2.28e9 a token (6 N + 6 L C T), 1.62e19 in all
#   memory       57.5 GiB with AdamW, 56.2 GiB with SGD-SaI, at 64 sequences a micro-step
#   time         11.4 hours on one H100 at 40% of its 989 TFLOP/s: $28 at $2.50 an hour
#
# The share of the peak and the price are assumptions, not measurements; MFU=0.5 PRICE=3 scripts/run_350m.sh
# --dry-run computes with yours. 20 tokens a parameter is a common budget (Hoffmann et al. 2022), and within
# one pass over OpenWebText's 9.0 billion. AdamW's rate is that of Brown et al. 2020, table 2.1, for this
# size. SGD-SaI's is where to begin, untuned: see run_124m.sh.
name=350m model=d24 parameters=354823168 layers=24 channels=1024
batch=64 total=524288 steps=13536
adamw=(--learning-rate 3e-4 --weight-decay 0.1)
sgd_sai=(--learning-rate 3e-3 --weight-decay 0.02)
source "$(dirname "$0")/run.sh"

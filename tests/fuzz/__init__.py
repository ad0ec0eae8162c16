"""The fuzzing campaign: valid files of every kind we read, damaged by seed, and judged by an oracle.

python -m tests.fuzz --count 5000          fresh seeds, and the corpus of past findings
python -m tests.fuzz --seed 41 --count 1   one case again
"""

"""What a user would pick instead, measured beside ours: each peer in a pinned environment of its own.

`python -m benchmarks.peers` (or `make peers`) makes the environments, starts one process a peer, and lets all of them
take turns: a run of one, then of the next, in another order every round. So nothing is compared that ran at another
time.

environments   the pinned packages of each
start, worker  what a peer's process does: prepares, then runs what it is told, one run at a time
process        the other end of that
jobs, figures  what is measured, how it is compared, and shown
encoder        a BERT of MiniLM's size as a service: which peers there are
encoder_*      one peer each, with nothing but its own packages
training       a step of quantization-aware training of the same model: which peers there are
training_*     one peer each
"""

"""Many experiments: `plan` says what is done and what is missing, `running` runs one and keeps what became of it.

`backends` hands them to processes or a cluster, `gpu_memory` lets only as many onto a GPU as fit, `estimate` says how
long the rest takes. Nothing is imported here, so that a wrong option is refused before torch is loaded.
"""

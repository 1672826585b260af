"""How much the loss grows when one group of layers is stored in one format.

    formats       what a layer can be stored in, by short names: int4_g64, nvfp4, ...
    groups        layers that share a format, because servers join them into one matrix
    calibration   the text, in batches
    increase      by how much outputs, or the loss, differ from those of the model as it is
    measure       every group in every format, on every batch; over several processes
    table         what was measured, as a file

Source: HAWQ (Dong et al. 2019) chooses bits by a layer's sensitivity.
"""

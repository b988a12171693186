import torch


def _blocks(values, scales, blocksize):
    return values * scales.repeat_interleave(blocksize)[: values.numel()]


def dequantize_4bit(packed, quant_state, dtype=None):
    q, second = quant_state, quant_state.state2
    absmax = q.absmax
    if second is not None:
        absmax = _blocks(second.code[absmax.long()], second.absmax, second.blocksize) + q.offset
    packed_bytes = packed.detach().contiguous().view(torch.uint8).flatten()
    halves = torch.stack((packed_bytes >> 4, packed_bytes & 15), 1).flatten()[: q.shape.numel()]
    w = _blocks(q.code[halves.long()], absmax, q.blocksize).to(q.dtype if dtype is None else dtype).view(q.shape)
    return w.t() if packed.dim() == 2 and packed.shape[0] == 1 < packed.shape[1] else w

// Where packed sequences start and end, for the scan's kernels; one thread a sequence. starts and ends (length) come zeroed:
// the number of the sequence, from 1, goes to its first and its last position; an empty one has none.
// Boundaries that the host has never seen (in a compiled or captured graph) must not give a silent wrong answer. Whatever
// they are, nothing is read or written out of bounds; later kernels find either good marks or a program that has stopped.
extern "C" __global__ void scan_marks(const int* cu, int* starts, int* ends, int sequences, int length) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= sequences) return;
  const int begin = cu[i], end = cu[i + 1];
  if (begin < 0 || end < begin || end > length || (i == 0 && begin != 0) || (i == sequences - 1 && end != length)) {
    printf("statescan: selective_scan: cu_seqlens must go from 0 to the length of u, %d, and never fall, got %d followed by %d\n",
           length, begin, end);
    __trap();
    return;
  }
  if (begin == end) return;
  starts[begin] = i + 1;
  ends[end - 1] = i + 1;
}

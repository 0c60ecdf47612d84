/* A CUDA runtime whose device is the host, as far as edgelm and polygraphy call it. */
#include <stdlib.h>
#include <string.h>
typedef struct { void *to; const void *from; size_t size; void (*work)(void); } Node;
typedef struct { int count; Node nodes[16]; } Graph;
static Graph recorded;
static int capturing, broken;
int launches, pinned;
static int run(Node n) { if (n.work) n.work(); else memcpy(n.to, n.from, n.size); return 0; }
static int put(Node n) { if (!capturing) return run(n); recorded.nodes[recorded.count++] = n; return 0; }
void break_captures(void) { broken = 1; }
int launch(void (*work)(void)) { Node n = {0, 0, 0, work}; return put(n); }
int cudaStreamCreate(void **stream) { *stream = malloc(1); return 0; }
int cudaStreamDestroy(void *stream) { free(stream); return 0; }
int cudaStreamSynchronize(void *stream) { return stream == 0 || capturing; }
int cudaMalloc(void **p, size_t size) { *p = calloc(1, size); return 0; }
int cudaFree(void *p) { free(p); return 0; }
int cudaHostAlloc(void **p, size_t size, unsigned flags) {
  *p = malloc(size); memset(*p, 0xAB, size); pinned++; return flags;
}
int cudaFreeHost(void *p) { free(p); pinned--; return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  Node n = {to, from, size, 0};
  return put(n) || kind < 1 || stream == 0;
}
int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; recorded.count = 0; return mode != 1; }
int cudaStreamEndCapture(void *stream, void **graph) {
  capturing = 0;
  if (broken) { *graph = 0; return 901; }
  *graph = malloc(sizeof(Graph));
  memcpy(*graph, &recorded, sizeof(Graph));
  return 0;
}
int cudaGraphInstantiateWithFlags(void **made, void *graph, unsigned long long flags) {
  *made = malloc(sizeof(Graph)); memcpy(*made, graph, sizeof(Graph)); return flags != 0;
}
int cudaGraphDestroy(void *graph) { free(graph); return 0; }
int cudaGraphExecDestroy(void *made) { free(made); return 0; }
int cudaGraphLaunch(void *made, void *stream) {
  Graph *graph = made; int i;
  for (i = 0; i < graph->count; i++) run(graph->nodes[i]);
  launches++;
  return stream == 0;
}
int cudaGetLastError(void) { return 0; }
const char *cudaGetErrorString(int status) { return "an error"; }

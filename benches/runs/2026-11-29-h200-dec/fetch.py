# What fetch.log was measured with (its first part by an earlier state: other lists of multiprocessors and copies).
#   python3 fetch.py alloc,huge,wc      (CuPy, an idle device)
import cupy as cp, numpy as np, mmap, ctypes, sys
src=r'''
typedef unsigned u32; typedef unsigned long long u64;
template<int W> struct V { u32 w[W]; };
template<int W> __device__ __forceinline__ void ld(u32 (&w)[W], const u32*p){
 if constexpr(W==4) asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];":"=r"(w[0]),"=r"(w[1]),"=r"(w[2]),"=r"(w[3]):"l"(p));
 else if constexpr(W==2) asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];":"=r"(w[0]),"=r"(w[1]):"l"(p));
 else asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];":"=r"(w[0]):"l"(p));
}
__device__ void barrier(u32* c, u32 target){
 __syncthreads();
 if(threadIdx.x==0){ __threadfence(); atomicAdd(c,1u); u32 v; do{ asm volatile("ld.acquire.gpu.global.u32 %0,[%1];":"=r"(v):"l"(c):"memory"); }while((int)(v-target)<0);} 
 __syncthreads();
}
__device__ long long now(){ long long t; asm volatile("mov.u64 %0, %%clock64;":"=l"(t)::"memory"); return t; }
extern __shared__ __align__(1024) char sh[];
template<int W,int F> __device__ void fetch(const char* base,const u64* rows,int nrows,const int* role,int stripe,int reps,u32* c,long long* out,u32* sink,int* smids){
 u32 smid; asm("mov.u32 %0, %%smid;":"=r"(smid)); int r=role[smid]; if(threadIdx.x==0) smids[blockIdx.x]=smid;
 u64* list=(u64*)sh; u32 acc=0;
 int width=stripe/(4*W); 
 int cols=width<512?width:512, teams=512/cols, team=threadIdx.x/cols, piece=threadIdx.x%cols;
 for(int rep=0;rep<reps;rep++){
  for(int i=threadIdx.x;i<nrows;i+=512) list[i]=rows[rep*nrows+i];
  barrier(c,(rep+1)*gridDim.x);
  long long t0=now();
  if(r>=0){
   for(int p=piece;p<width;p+=cols){
   const char* col=base+(u64)r*stripe+p*4*W;
   for(int i=team<teams?team:nrows;i<nrows;i+=F*teams){
    u32 w[F][W];
#pragma unroll
    for(int f=0;f<F;f++) if(i+f*teams<nrows) ld<W>(w[f],(const u32*)(col+list[i+f*teams]));
#pragma unroll
    for(int f=0;f<F;f++) if(i+f*teams<nrows)
#pragma unroll
     for(int j=0;j<W;j++) acc+=w[f][j];
   }}
   asm volatile(""::"r"(acc):"memory");
  }
  __syncthreads();
  if(threadIdx.x==0) out[rep*gridDim.x+blockIdx.x]= r>=0? now()-t0 : 0;
 }
 if(acc==0x12345) sink[0]=acc;
}
#define K(W,F) extern "C" __global__ void __launch_bounds__(512,1) f##W##_##F(const char* b,const u64* rows,int n,const int* role,int s,int reps,u32* c,long long* o,u32* k,int* m){ fetch<W,F>(b,rows,n,role,s,reps,c,o,k,m); }
K(1,4) K(1,8) K(2,1) K(2,4) K(2,8) K(4,1) K(4,4) K(4,8)
extern "C" __global__ void __launch_bounds__(512,1) bulk(const char* base,const u64* rows,int nrows,const int* role,int stripe,int reps,u32* c,long long* out,u32* sink,int* smids){
 u32 smid; asm("mov.u32 %0, %%smid;":"=r"(smid)); int r=role[smid];
 u64* list=(u64*)sh; u32 bar; { u64 a=(u64)__cvta_generic_to_shared(sh+8192); bar=(u32)a; }
 u32 dst=bar+1024;
 if(threadIdx.x==0) asm volatile("mbarrier.init.shared.b64 [%0],1;"::"r"(bar):"memory");
 asm volatile("fence.mbarrier_init.release.cluster;":::"memory");
 for(int rep=0;rep<reps;rep++){
  for(int i=threadIdx.x;i<nrows;i+=512) list[i]=rows[rep*nrows+i];
  barrier(c,(rep+1)*gridDim.x);
  long long t0=now();
  if(r>=0){
   if(threadIdx.x==0) asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;"::"r"(bar),"r"(nrows*stripe):"memory");
   __syncthreads();
   for(int i=threadIdx.x;i<nrows;i+=512)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"::"r"(dst+i*stripe),"l"(base+list[i]+(u64)r*stripe),"r"(stripe),"r"(bar):"memory");
   asm volatile("{\n.reg .pred p;\nL: mbarrier.try_wait.parity.shared.b64 p,[%0],%1;\n@!p bra L;\n}"::"r"(bar),"r"(rep&1):"memory");
  }
  __syncthreads();
  if(threadIdx.x==0) out[rep*gridDim.x+blockIdx.x]= r>=0? now()-t0 : 0;
 }
}
extern "C" __global__ void __launch_bounds__(512,1) tbulk(const char* base,const u64* rows,int nrows,const int* role,int stripe,int reps,u32* c,long long* out,u32* sink,int* smids,int mode,u64 region,u64 stride,const u64* starts){
 u32 smid; asm("mov.u32 %0, %%smid;":"=r"(smid)); int r=role[smid];
 u64* list=(u64*)sh; u32 bar; { u64 a=(u64)__cvta_generic_to_shared(sh+8192); bar=(u32)a; }
 u32 dst=bar+1024;
 if(threadIdx.x==0) asm volatile("mbarrier.init.shared.b64 [%0],1;"::"r"(bar):"memory");
 asm volatile("fence.mbarrier_init.release.cluster;":::"memory");
 for(int rep=0;rep<reps;rep++){
  for(int i=threadIdx.x;i<nrows;i+=512) list[i]=rows[rep*nrows+i];
  u32 t=0;
  if((mode==1&&r>=0)||(mode==2&&r==0)||(mode==3&&r>=0)){
   if(mode==3){ for(int i=threadIdx.x;i<nrows;i+=512){ u32 w[1]; ld<1>(w,(const u32*)(base+list[i]/stride*stride)); t+=w[0]; } }
   else for(u64 i=threadIdx.x*stride;i<region;i+=512*stride){ u32 w[1]; ld<1>(w,(const u32*)(base+starts[rep]+i)); t+=w[0]; }
  }
  if(t==0x1234567) sink[2]=t;
  barrier(c,(2*rep+1)*gridDim.x);
  long long tw=now(); while(now()-tw<6000) ;
  barrier(c,(2*rep+2)*gridDim.x);
  long long t0=now();
  if(r>=0){
   if(threadIdx.x==0) asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;"::"r"(bar),"r"(nrows*stripe):"memory");
   __syncthreads();
   for(int i=threadIdx.x%32*16+threadIdx.x/32;i<nrows;i+=512)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"::"r"(dst+i*stripe),"l"(base+list[i]+(u64)r*stripe),"r"(stripe),"r"(bar):"memory");
   asm volatile("{\n.reg .pred p;\nL: mbarrier.try_wait.parity.shared.b64 p,[%0],%1;\n@!p bra L;\n}"::"r"(bar),"r"(rep&1):"memory");
  }
  __syncthreads();
  if(threadIdx.x==0) out[rep*gridDim.x+blockIdx.x]= r>=0? now()-t0 : 0;
 }
}
extern "C" __global__ void chase(const char* base,const u64* rows,int n,long long* out,u32* sink){
 u32 acc=0;
 for(int i=0;i<n;i++){ long long t0=now(); u32 w[1]; ld<1>(w,(const u32*)(base+rows[i]+(acc&1)*4)); acc+=w[0]; asm volatile(""::"r"(acc):"memory"); out[i]=now()-t0+(acc&0); if (acc==77) out[i]=0; }
 sink[1]=acc;
}
'''
mod=cp.RawModule(code=src,options=('--std=c++17',),backend='nvrtc')
dev=cp.cuda.Device(); clk=dev.attributes['ClockRate']/1e3
rt=cp.cuda.runtime; lib=ctypes.CDLL('libcudart.so.13') if False else None
props=rt.getDeviceProperties(0); print(props['name'],'MHz attr',clk,'SMs',props['multiProcessorCount'])
N=132
SZ=3<<30
libc=ctypes.CDLL(None)
libc.madvise.argtypes=[ctypes.c_void_p,ctypes.c_size_t,ctypes.c_int]
def alloc(kind):
    if kind=='alloc':
        p=rt.hostAlloc(SZ,rt.hostAllocMapped|rt.hostAllocPortable) if hasattr(rt,'hostAllocMapped') else rt.hostAlloc(SZ,3)
        ctypes.memset(p,1,SZ); return p,None
    m=mmap.mmap(-1,SZ,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)
    a=np.frombuffer(m,dtype=np.uint8); p=a.ctypes.data
    r=libc.madvise(p,SZ,14 if kind=='huge' else 15); print(kind,'madvise',r)
    ctypes.memset(p,1,SZ)
    rt.hostRegister(p,SZ,3)
    return p,(m,a)
rng=np.random.default_rng(1)
sink=cp.zeros(4,cp.uint32); smids=cp.zeros(N,cp.int32)
REPS=40
def run(k,base,sms,rowbytes,nrows,span,stripe=None):
    nb=len(sms); stripe=stripe or rowbytes//nb
    role=np.full(N,-1,np.int32)
    for i,s in enumerate(sms): role[s]=i
    tot=span//rowbytes
    off=rng.integers(0,max(1,(SZ-span)//rowbytes//2))*rowbytes if span<SZ else 0
    if tot>=REPS*nrows: rows=rng.permutation(tot)[:REPS*nrows]
    else: rows=rng.integers(0,tot,REPS*nrows)
    rows=cp.asarray(rows.astype(np.uint64)*np.uint64(rowbytes)+np.uint64(off))
    c=cp.zeros(1,cp.uint32); out=cp.zeros(REPS*N,cp.int64)
    mod.get_function(k)((N,),(512,),(base,rows,np.int32(nrows),cp.asarray(role),np.int32(stripe),np.int32(REPS),c,out,sink,smids),shared_mem=200*1024)
    o=out.get().reshape(REPS,N)[3:]
    mx=np.median(o.max(1))/GHZ; mn=np.median(np.where(o>0,o,1<<40).min(1))/GHZ
    return mx,mn,nb*stripe*nrows/mx
for f in ['f1_4','f1_8','f2_1','f2_4','f2_8','f4_1','f4_4','f4_8','bulk']:
    mod.get_function(f).max_dynamic_shared_size_bytes=200*1024
GHZ=1980.0/1e3*1 # cycles per ns
def show(tag,r): print('%-58s max %7.0f ns  min %7.0f ns  %6.2f GB/s'%((tag,)+r),flush=True)

def trun(base,nb,rowbytes,nrows,region,mode,stride,fixed=False):
    role=np.full(N,-1,np.int32)
    for i in range(nb): role[N-nb+i]=i
    st=(rowbytes//nb+127)//128*128
    starts=rng.integers(0,(SZ-region)>>21,REPS).astype(np.uint64)<<np.uint64(21)
    if fixed: starts[:]=starts[0]
    rows=np.concatenate([starts[k]+rng.permutation(region//rowbytes)[:nrows].astype(np.uint64)*np.uint64(rowbytes) for k in range(REPS)])
    c=cp.zeros(1,cp.uint32); out=cp.zeros(REPS*N,cp.int64)
    f=mod.get_function('tbulk'); f.max_dynamic_shared_size_bytes=200*1024
    f((N,),(512,),(base,cp.asarray(rows),np.int32(nrows),cp.asarray(role),np.int32(st),np.int32(REPS),c,out,sink,smids,np.int32(mode),np.uint64(region),np.uint64(stride),cp.asarray(starts)),shared_mem=200*1024)
    o=out.get().reshape(REPS,N)[3:]
    mx=np.median(o.max(1))/GHZ
    return mx, np.percentile(o.max(1),90)/GHZ, nb*st*nrows/mx
import os
os.system('cat /sys/bus/pci/devices/*/numa_node 2>/dev/null | sort | uniq -c; lscpu | grep -i numa')
for kind in sys.argv[1].split(','):
    if kind=='wc':
        p=rt.hostAlloc(SZ,7); keep=None; cp.cuda.runtime.memset(p,1,SZ) if False else None
    else: p,keep=alloc(kind)
    base=np.uint64(p)
    print('=====',kind)
    for name,rb,n,reg in [('o',2048,32,8<<20),('qkv',3072,32,12<<20),('d',2048,112,28<<20)]:
        for nb in [8,16]:
            if name=='qkv' and nb==16: continue
            for tag,mode,stride,fixed in [('same region',0,1<<21,True),('none',0,1<<21,False),('own 2M',1,1<<21,False),('own 64K',1,1<<16,False),('one block 2M',2,1<<21,False),('one block 64K',2,1<<16,False),('rows 64K',3,1<<16,False),('rows 4K',3,1<<12,False)]:
                print('%-4s nb %2d %-14s  median %6.0f  p90 %6.0f ns  %5.1f GB/s'%((name,nb,tag)+trun(base,nb,rb,n,reg,mode,stride,fixed)),flush=True)

"""The device stage of nanopack: one Triton kernel and its torch twin. Import it as `nanopack.kernels`."""

# PyPI has a package named `kernels`, so this folder must never be taken for it.
if __name__ == "kernels":
    raise ImportError(
        "this folder is nanopack.kernels, not a package named 'kernels'. "
        "Import nanopack.kernels, and do not put nanopack's source folder on sys.path."
    )

# cu_seqlens has a multiple of this many elements, so that the kernel's stores are wide.
CU_ALIGN = 128

/*
 * A stand-in for the calls of macOS' libSystem that emberd makes, to run its ctypes code on any system.
 *
 * Not the kernel: it answers what the tests told it to, in the layouts and with the failures that are documented.
 * Layouts: xnu, bsd/sys/resource.h (rusage_info_v4), osfmk/mach/vm_statistics.h (vm_statistics64), bsd/sys/sysctl.h
 * (xsw_usage), bsd/sys/proc_info.h (proc_regionwithpathinfo). Failures: xnu, bsd/kern/proc_info.c; sysctl(3); getxattr(2); osfmk/kern/host.c; mach_msg's stubs.
 *
 * Values are set by the name of a field, so that a test never shares a layout with what it tests.
 */

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

/* --- layouts, written as the headers have them -------------------------------------------------------------- */

typedef unsigned int natural_t;
typedef int integer_t;
typedef int boolean_t;
typedef unsigned int mach_port_t;
typedef int kern_return_t;

struct rusage_info_v4 {
    uint8_t ri_uuid[16];
    uint64_t ri_user_time, ri_system_time, ri_pkg_idle_wkups, ri_interrupt_wkups;
    uint64_t ri_pageins;
    uint64_t ri_wired_size, ri_resident_size, ri_phys_footprint;
    uint64_t ri_proc_start_abstime, ri_proc_exit_abstime; /* the end of V0, 96 bytes */
    uint64_t ri_child_user_time, ri_child_system_time;
    uint64_t ri_child_pkg_idle_wkups, ri_child_interrupt_wkups;
    uint64_t ri_child_pageins, ri_child_elapsed_abstime; /* V1, 144 */
    uint64_t ri_diskio_bytesread, ri_diskio_byteswritten; /* V2, 160 */
    uint64_t ri_cpu_time_qos_default, ri_cpu_time_qos_maintenance, ri_cpu_time_qos_background;
    uint64_t ri_cpu_time_qos_utility, ri_cpu_time_qos_legacy, ri_cpu_time_qos_user_initiated;
    uint64_t ri_cpu_time_qos_user_interactive;
    uint64_t ri_billed_system_time, ri_serviced_system_time; /* V3, 232 */
    uint64_t ri_logical_writes, ri_lifetime_max_phys_footprint;
    uint64_t ri_instructions, ri_cycles, ri_billed_energy, ri_serviced_energy;
    uint64_t ri_interval_max_phys_footprint, ri_runnable_time; /* V4, 296 */
};

struct vm_statistics64 {
    natural_t free_count, active_count, inactive_count, wire_count;
    uint64_t zero_fill_count, reactivations, pageins, pageouts, faults, cow_faults, lookups, hits, purges;
    natural_t purgeable_count, speculative_count; /* HOST_VM_INFO64_REV0_COUNT */
    uint64_t decompressions, compressions, swapins, swapouts;
    natural_t compressor_page_count, throttled_count, external_page_count, internal_page_count;
    uint64_t total_uncompressed_pages_in_compressor; /* HOST_VM_INFO64_REV1_COUNT */
} __attribute__((aligned(8)));

struct xsw_usage {
    uint64_t xsu_total, xsu_avail, xsu_used;
    uint32_t xsu_pagesize;
    boolean_t xsu_encrypted;
};

struct proc_regioninfo {
    uint32_t pri_protection, pri_max_protection, pri_inheritance, pri_flags;
    uint64_t pri_offset;
    uint32_t pri_behavior, pri_user_wired_count, pri_user_tag, pri_pages_resident, pri_pages_shared_now_private;
    uint32_t pri_pages_swapped_out, pri_pages_dirtied, pri_ref_count, pri_shadow_depth, pri_share_mode;
    uint32_t pri_private_pages_resident, pri_shared_pages_resident, pri_obj_id, pri_depth;
    uint64_t pri_address, pri_size;
};

struct vinfo_stat {
    uint32_t vst_dev;
    uint16_t vst_mode, vst_nlink;
    uint64_t vst_ino;
    uint32_t vst_uid, vst_gid; /* uid_t, gid_t */
    int64_t vst_atime, vst_atimensec, vst_mtime, vst_mtimensec, vst_ctime, vst_ctimensec;
    int64_t vst_birthtime, vst_birthtimensec;
    int64_t vst_size, vst_blocks; /* off_t */
    int32_t vst_blksize;
    uint32_t vst_flags, vst_gen, vst_rdev;
    int64_t vst_qspare[2];
};

struct vnode_info {
    struct vinfo_stat vi_stat;
    int vi_type, vi_pad;
    struct {
        int32_t val[2];
    } vi_fsid;
};

#define MAXPATHLEN 1024

struct vnode_info_path {
    struct vnode_info vip_vi;
    char vip_path[MAXPATHLEN];
};

struct proc_regionwithpathinfo {
    struct proc_regioninfo prp_prinfo;
    struct vnode_info_path prp_vip;
};

/* --- their description, as this compiler sees them ----------------------------------------------------------- */

struct field {
    const char *name;
    size_t offset;
    size_t size;
};

#define RUSAGE(name) {#name, offsetof(struct rusage_info_v4, name), sizeof(((struct rusage_info_v4 *)0)->name)}
#define VM(name) {#name, offsetof(struct vm_statistics64, name), sizeof(((struct vm_statistics64 *)0)->name)}
#define XSW(name) {#name, offsetof(struct xsw_usage, name), sizeof(((struct xsw_usage *)0)->name)}

const struct field standin_rusage_info_v4_fields[] = {
    RUSAGE(ri_uuid), RUSAGE(ri_user_time), RUSAGE(ri_system_time), RUSAGE(ri_pkg_idle_wkups),
    RUSAGE(ri_interrupt_wkups), RUSAGE(ri_pageins), RUSAGE(ri_wired_size), RUSAGE(ri_resident_size),
    RUSAGE(ri_phys_footprint), RUSAGE(ri_proc_start_abstime), RUSAGE(ri_proc_exit_abstime),
    RUSAGE(ri_child_user_time), RUSAGE(ri_child_system_time), RUSAGE(ri_child_pkg_idle_wkups),
    RUSAGE(ri_child_interrupt_wkups), RUSAGE(ri_child_pageins), RUSAGE(ri_child_elapsed_abstime),
    RUSAGE(ri_diskio_bytesread), RUSAGE(ri_diskio_byteswritten), RUSAGE(ri_cpu_time_qos_default),
    RUSAGE(ri_cpu_time_qos_maintenance), RUSAGE(ri_cpu_time_qos_background), RUSAGE(ri_cpu_time_qos_utility),
    RUSAGE(ri_cpu_time_qos_legacy), RUSAGE(ri_cpu_time_qos_user_initiated),
    RUSAGE(ri_cpu_time_qos_user_interactive), RUSAGE(ri_billed_system_time), RUSAGE(ri_serviced_system_time),
    RUSAGE(ri_logical_writes), RUSAGE(ri_lifetime_max_phys_footprint), RUSAGE(ri_instructions),
    RUSAGE(ri_cycles), RUSAGE(ri_billed_energy), RUSAGE(ri_serviced_energy),
    RUSAGE(ri_interval_max_phys_footprint), RUSAGE(ri_runnable_time), {NULL, 0, sizeof(struct rusage_info_v4)},
};

const struct field standin_vm_statistics64_fields[] = {
    VM(free_count), VM(active_count), VM(inactive_count), VM(wire_count), VM(zero_fill_count),
    VM(reactivations), VM(pageins), VM(pageouts), VM(faults), VM(cow_faults), VM(lookups), VM(hits), VM(purges),
    VM(purgeable_count), VM(speculative_count), VM(decompressions), VM(compressions), VM(swapins), VM(swapouts),
    VM(compressor_page_count), VM(throttled_count), VM(external_page_count), VM(internal_page_count),
    VM(total_uncompressed_pages_in_compressor), {NULL, 0, sizeof(struct vm_statistics64)},
};

const struct field standin_xsw_usage_fields[] = {
    XSW(xsu_total), XSW(xsu_avail), XSW(xsu_used), XSW(xsu_pagesize), XSW(xsu_encrypted),
    {NULL, 0, sizeof(struct xsw_usage)},
};

#define REGION(name) {#name, offsetof(struct proc_regioninfo, name), sizeof(((struct proc_regioninfo *)0)->name)}
#define STAT(name) {#name, offsetof(struct vinfo_stat, name), sizeof(((struct vinfo_stat *)0)->name)}
#define WITH(name, place)                                                                                          \
    {#name, offsetof(struct proc_regionwithpathinfo, place), sizeof(((struct proc_regionwithpathinfo *)0)->place)}

const struct field standin_proc_regioninfo_fields[] = {
    REGION(pri_protection), REGION(pri_max_protection), REGION(pri_inheritance), REGION(pri_flags),
    REGION(pri_offset), REGION(pri_behavior), REGION(pri_user_wired_count), REGION(pri_user_tag),
    REGION(pri_pages_resident), REGION(pri_pages_shared_now_private), REGION(pri_pages_swapped_out),
    REGION(pri_pages_dirtied), REGION(pri_ref_count), REGION(pri_shadow_depth), REGION(pri_share_mode),
    REGION(pri_private_pages_resident), REGION(pri_shared_pages_resident), REGION(pri_obj_id), REGION(pri_depth),
    REGION(pri_address), REGION(pri_size), {NULL, 0, sizeof(struct proc_regioninfo)},
};

const struct field standin_vinfo_stat_fields[] = {
    STAT(vst_dev), STAT(vst_mode), STAT(vst_nlink), STAT(vst_ino), STAT(vst_uid), STAT(vst_gid), STAT(vst_atime),
    STAT(vst_atimensec), STAT(vst_mtime), STAT(vst_mtimensec), STAT(vst_ctime), STAT(vst_ctimensec),
    STAT(vst_birthtime), STAT(vst_birthtimensec), STAT(vst_size), STAT(vst_blocks), STAT(vst_blksize),
    STAT(vst_flags), STAT(vst_gen), STAT(vst_rdev), STAT(vst_qspare), {NULL, 0, sizeof(struct vinfo_stat)},
};

const struct field standin_proc_regionwithpathinfo_fields[] = {
    WITH(prp_prinfo, prp_prinfo), WITH(vi_stat, prp_vip.vip_vi.vi_stat), WITH(vi_type, prp_vip.vip_vi.vi_type),
    WITH(vi_pad, prp_vip.vip_vi.vi_pad), WITH(vi_fsid, prp_vip.vip_vi.vi_fsid), WITH(vip_path, prp_vip.vip_path),
    {NULL, 0, sizeof(struct proc_regionwithpathinfo)},
};

/* Puts a value into the named field of a structure; returns 0, or -1 if it has none of that name. */
static int put(const struct field *fields, void *structure, const char *name, uint64_t value)
{
    for (; fields->name != NULL; fields++) {
        if (strcmp(fields->name, name) == 0) {
            memcpy((char *)structure + fields->offset, &value, fields->size < 8 ? fields->size : 8);
            return 0;
        }
    }
    return -1;
}

/* --- processes ----------------------------------------------------------------------------------------------- */

#define MOST 32
#define RUSAGE_INFO_V4 4

static struct process {
    int pid;
    int error;
    struct rusage_info_v4 usage;
} processes[MOST];
static int process_count;

static struct process *find_process(int pid)
{
    for (int i = 0; i < process_count; i++) {
        if (processes[i].pid == pid) {
            return &processes[i];
        }
    }
    return NULL;
}

/* Adds a process; with an error other than 0 it cannot be asked: EPERM is another user's. */
int standin_process(int pid, int error)
{
    if (process_count == MOST || find_process(pid) != NULL) {
        return -1;
    }
    processes[process_count].pid = pid;
    processes[process_count].error = error;
    memset(&processes[process_count].usage, 0, sizeof(struct rusage_info_v4));
    process_count++;
    return 0;
}

int standin_usage(int pid, const char *field, uint64_t value)
{
    struct process *process = find_process(pid);
    return process == NULL ? -1 : put(standin_rusage_info_v4_fields, &process->usage, field, value);
}

int proc_pid_rusage(int pid, int flavor, void *buffer)
{
    struct process *process = find_process(pid);
    if (process == NULL) {
        errno = ESRCH;
        return -1;
    }
    if (process->error != 0) {
        errno = process->error;
        return -1;
    }
    if (flavor != RUSAGE_INFO_V4) { /* others exist, with other layouts: nothing here should ask for them */
        errno = EINVAL;
        return -1;
    }
    memcpy(buffer, &process->usage, sizeof(struct rusage_info_v4));
    return 0;
}

#define PROC_PIDREGIONPATHINFO2 22

static struct region {
    int pid;
    struct proc_regionwithpathinfo info;
} regions[MOST];
static int region_count;

/* Adds a region that maps a file; those of a process are added in the order of their addresses. */
int standin_region(int pid, const char *path, uint64_t address, uint64_t size, uint32_t wired, uint32_t dev,
                   uint64_t inode)
{
    if (region_count == MOST || strlen(path) >= MAXPATHLEN) {
        return -1;
    }
    struct region *region = &regions[region_count++];
    memset(region, 0, sizeof(*region));
    region->pid = pid;
    region->info.prp_prinfo.pri_address = address;
    region->info.prp_prinfo.pri_size = size;
    region->info.prp_prinfo.pri_user_wired_count = wired;
    region->info.prp_vip.vip_vi.vi_stat.vst_dev = dev;
    region->info.prp_vip.vip_vi.vi_stat.vst_ino = inode;
    strcpy(region->info.prp_vip.vip_path, path);
    return 0;
}

/* Returns the bytes of the answer, 0 and errno on failure (libproc.h). */
int proc_pidinfo(int pid, int flavor, uint64_t address, void *buffer, int size)
{
    struct process *process = find_process(pid);
    if (process == NULL || process->error != 0) {
        errno = process == NULL ? ESRCH : process->error;
        return 0;
    }
    if (flavor != PROC_PIDREGIONPATHINFO2) {
        errno = EINVAL;
        return 0;
    }
    if (size < (int)sizeof(struct proc_regionwithpathinfo)) {
        errno = ENOMEM;
        return 0;
    }
    for (int i = 0; i < region_count; i++) {
        const struct proc_regioninfo *info = &regions[i].info.prp_prinfo;
        if (regions[i].pid == pid && info->pri_address + info->pri_size > address) {
            memcpy(buffer, &regions[i].info, sizeof(struct proc_regionwithpathinfo));
            return sizeof(struct proc_regionwithpathinfo);
        }
    }
    errno = EINVAL; /* no further file is mapped */
    return 0;
}

/* --- sysctl -------------------------------------------------------------------------------------------------- */

static struct sysctl {
    char name[64];
    size_t width;
    unsigned char value[64];
} sysctls[MOST];
static int sysctl_count;
static struct xsw_usage swap_usage;

/* Adds or replaces a number of so many bytes; a width that no number has stands for another kind of value. */
int standin_sysctl(const char *name, size_t width, uint64_t value)
{
    int i = 0;
    while (i < sysctl_count && strcmp(sysctls[i].name, name) != 0) {
        i++;
    }
    if (i == MOST || strlen(name) >= sizeof(sysctls[i].name) || width > sizeof(sysctls[i].value)) {
        return -1;
    }
    strcpy(sysctls[i].name, name);
    sysctls[i].width = width;
    memset(sysctls[i].value, 0, sizeof(sysctls[i].value));
    memcpy(sysctls[i].value, &value, width < 8 ? width : 8);
    sysctl_count += i == sysctl_count;
    return 0;
}

/* Sets a field of vm.swapusage, which exists from then on. */
int standin_swap(const char *field, uint64_t value)
{
    if (put(standin_xsw_usage_fields, &swap_usage, field, value) != 0
        || standin_sysctl("vm.swapusage", sizeof(swap_usage), 0) != 0) {
        return -1;
    }
    for (int i = 0; i < sysctl_count; i++) {
        if (strcmp(sysctls[i].name, "vm.swapusage") == 0) {
            memcpy(sysctls[i].value, &swap_usage, sizeof(swap_usage));
        }
    }
    return 0;
}

int sysctlbyname(const char *name, void *old, size_t *old_length, const void *new, size_t new_length)
{
    if (new != NULL || new_length != 0) {
        errno = EPERM; /* only root writes, and emberd never does */
        return -1;
    }
    for (int i = 0; i < sysctl_count; i++) {
        if (strcmp(sysctls[i].name, name) != 0) {
            continue;
        }
        if (*old_length < sysctls[i].width) {
            memcpy(old, sysctls[i].value, *old_length);
            errno = ENOMEM;
            return -1;
        }
        memcpy(old, sysctls[i].value, sysctls[i].width);
        *old_length = sysctls[i].width;
        return 0;
    }
    errno = ENOENT;
    return -1;
}

/* --- host_statistics64 --------------------------------------------------------------------------------------- */

#define HOST_VM_INFO64 4
#define KERN_SUCCESS 0
#define KERN_INVALID_ARGUMENT 4
#define KERN_FAILURE 5
#define KERN_INVALID_HOST 22
#define MIG_ARRAY_TOO_LARGE (-307)
#define MOST_INTS 256
#define HOST_PORT 0x1203u

static struct vm_statistics64 statistics;
static unsigned int kernel_ints;
static int is_strict, failure;
static unsigned int port_references, calls, last_count;

int standin_statistic(const char *field, uint64_t value)
{
    return put(standin_vm_statistics64_fields, &statistics, field, value);
}

/*
 * How the kernel answers: it counts `ints` integers, 38 up to macOS 15, 40 or 62 after it. A strict one refuses a
 * shorter buffer, as newer ones do most of the time; the others fill what fits. A failure other than 0 is returned
 * to every call.
 */
void standin_kernel(unsigned int ints, int strict, int fails_with)
{
    kernel_ints = ints;
    is_strict = strict;
    failure = fails_with;
}

unsigned int standin_port_references(void) { return port_references; }
unsigned int standin_statistics_calls(void) { return calls; }
unsigned int standin_last_count(void) { return last_count; } /* that was passed in */

mach_port_t mach_host_self(void)
{
    port_references++;
    return HOST_PORT;
}

kern_return_t host_statistics64(mach_port_t host, int flavor, integer_t *info, unsigned int *count)
{
    calls++;
    last_count = *count;
    if (host != HOST_PORT) {
        return KERN_INVALID_HOST;
    }
    if (flavor != HOST_VM_INFO64 || *count > MOST_INTS) {
        return KERN_INVALID_ARGUMENT;
    }
    if (failure != KERN_SUCCESS) {
        return failure;
    }
    /* What a newer kernel has behind the structure is not zero, so that a reading from there would show. */
    integer_t all[MOST_INTS];
    memset(all, 0xA5, sizeof(all));
    memcpy(all, &statistics, sizeof(statistics));
    unsigned int filled = *count < kernel_ints ? *count : kernel_ints;
    memcpy(info, all, (filled < MOST_INTS ? filled : MOST_INTS) * sizeof(integer_t));
    if (is_strict && *count < kernel_ints) {
        *count = kernel_ints;
        return MIG_ARRAY_TOO_LARGE;
    }
    *count = filled;
    return KERN_SUCCESS;
}

/* --- extended attributes ------------------------------------------------------------------------------------- */

#define APPLE_ENOATTR 93

static char attribute_path[1024], attribute_name[128], attribute_value[256];
static size_t attribute_length;

/* The one file that has an extended attribute. */
int standin_attribute(const char *path, const char *name, const char *value, size_t length)
{
    if (strlen(path) >= sizeof(attribute_path) || strlen(name) >= sizeof(attribute_name)
        || length > sizeof(attribute_value)) {
        return -1;
    }
    strcpy(attribute_path, path);
    strcpy(attribute_name, name);
    memcpy(attribute_value, value, length);
    attribute_length = length;
    return 0;
}

ssize_t getxattr(const char *path, const char *name, void *value, size_t size, uint32_t position, int options)
{
    if (position != 0 || options != 0) {
        errno = EINVAL;
        return -1;
    }
    if (strcmp(path, attribute_path) != 0 || strcmp(name, attribute_name) != 0) {
        errno = APPLE_ENOATTR;
        return -1;
    }
    if (value == NULL) {
        return (ssize_t)attribute_length;
    }
    if (size < attribute_length) {
        errno = ERANGE;
        return -1;
    }
    memcpy(value, attribute_value, attribute_length);
    return (ssize_t)attribute_length;
}

/* Sockets of the job, launch_activate_socket(3): the caller frees the array; a second call fails with EALREADY. */

#define SOCKETS 4

static int launchd_error;
static int launchd_sockets[SOCKETS];
static size_t launchd_count;

/* Says with what launchd answers: an error, or so many sockets. */
int standin_launchd(int error, const int *sockets, size_t count)
{
    if (count > SOCKETS)
        return -1;
    launchd_error = error;
    launchd_count = count;
    if (count)
        memcpy(launchd_sockets, sockets, count * sizeof(int));
    return 0;
}

int launch_activate_socket(const char *name, int **sockets, size_t *count)
{
    if (launchd_error)
        return launchd_error;
    if (strcmp(name, "Listeners") != 0)
        return ENOENT;
    *sockets = malloc(SOCKETS * sizeof(int));
    memcpy(*sockets, launchd_sockets, launchd_count * sizeof(int));
    *count = launchd_count;
    launchd_error = EALREADY;
    return 0;
}

/* Forgets all: a computer of which nothing is known. */
void standin_reset(void)
{
    launchd_error = ESRCH;
    launchd_count = 0;
    process_count = sysctl_count = region_count = 0;
    memset(&swap_usage, 0, sizeof(swap_usage));
    memset(&statistics, 0, sizeof(statistics));
    standin_kernel(sizeof(statistics) / sizeof(integer_t), 0, KERN_SUCCESS);
    port_references = calls = last_count = 0;
    attribute_path[0] = attribute_name[0] = '\0';
    attribute_length = 0;
}

/* What build.rs binds, at the API version of the headers installed. xenctrl.h has to come before xenguest.h. */
#include <stdio.h>
#include <xenctrl.h>
#include <xenguest.h>
#include <xenforeignmemory.h>
#include <xenevtchn.h>
#include <xentoollog.h>
#include <libxl.h>
#include <libxl_utils.h>
#include <libxlutil.h>
